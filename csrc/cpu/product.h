// Rows of a panel times a packed matrix. direct.h: the same with a matrix as it lies in memory.
//
// Computes   acc[row, column] = sum_k panel[row, k] * weight[k, column], for a run of blocks of columns
// Work       register tiles of up to kMaxRows rows and a few pairs of column vectors; K is cut so that the weights of a
//            tile stay in L1 while all rows pass over them
// Memory     a tile's sums in registers; every weight is read once per run and, from L1, once per tile of rows
// Requires   scratch and sums aligned to the vector; panels hold K elements a row, weights their [gates, units, K]
// Order      k ascending, one accumulator for each kChunk of them, and these added up in turn: a result depends neither
//            on the tile nor on the other rows
//
// A packed matrix serves `units` hidden units with `gates` columns each. A block is the least number of vectors of
// units whose columns make whole pairs; a pair of columns lies [k][2][lanes], a last odd column is paired with zeros.
// Column (vector u of the run, gate g) of a run of blocks is number u * gates + g.
#pragma once

#include <utility>

#include "storage.h"

namespace fastrnn {
namespace FASTRNN_ISA {

constexpr int kMaxRows = 6;      // rows of a tile
constexpr int kMaxRunRows = 48;  // rows of a run: their sums stay in L1 beside the weights
constexpr int kMaxRunPairs = 4;  // pairs of columns of a run: enough sums in flight for a single row
constexpr int kChunk = 256;      // k of a pair of columns in L1: 16 KiB with AVX2, 32 KiB with AVX-512
constexpr int kPair = 2;

constexpr int64_t kCachedElements = 1 << 18;  // of a packed matrix that stays in the second cache

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct PackedShape {
  const int64_t units, gates, K, lanes;
  const int64_t vectors;        // of units
  const int64_t block_vectors;  // vectors of units of a block
  const int64_t block_pairs;    // pairs of columns of a block
  const int64_t blocks;
  const int64_t run_blocks;  // blocks of a run
  const int64_t pair_size;   // elements of a pair of columns
  const bool is_large;       // does not stay in the second cache from one step to the next

  PackedShape(int64_t units_, int64_t gates_, int64_t K_, int lanes_)
      : units(units_),
        gates(gates_),
        K(K_),
        lanes(lanes_),
        vectors(ceil_div(units, lanes)),
        block_vectors(gates % kPair ? kPair : 1),
        block_pairs(gates * block_vectors / kPair),
        blocks(ceil_div(vectors, block_vectors)),
        run_blocks(block_pairs < kMaxRunPairs ? kMaxRunPairs / block_pairs : 1),
        pair_size(K * kPair * lanes),
        is_large(blocks * block_pairs * pair_size > kCachedElements) {}

  int64_t size() const { return blocks * block_pairs * pair_size; }
  int64_t columns(int64_t begin, int64_t end) const { return (end - begin) * block_pairs * kPair; }
  // The vectors of units of blocks [begin, end).
  int64_t first_vector(int64_t block) const { return block * block_vectors; }
  int64_t vectors_in(int64_t begin, int64_t end) const {
    const int64_t last = end * block_vectors;
    return (last < vectors ? last : vectors) - first_vector(begin);
  }
};

// The sums of a run: [rows][columns][lanes].
template <class S>
struct RunSums {
  alignas(64) S data[kMaxRunRows * kMaxRunPairs * kPair * Vec<S>::kLanes];
};

// Swaps rows and columns of a square of lanes: each round interleaves the first half of the rows with the second.
template <class V, size_t... I>
FASTRNN_INLINE void interleave(V a, V b, V& low, V& high, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I);
  low = __builtin_shufflevector(a.raw, b.raw, static_cast<int>(I / 2 + (I % 2) * n)...);
  high = __builtin_shufflevector(a.raw, b.raw, static_cast<int>(n / 2 + I / 2 + (I % 2) * n)...);
}
template <class S>
FASTRNN_INLINE void transpose(Vec<S>* rows) {
  constexpr int n = Vec<S>::kLanes;
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
    Vec<S> next[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i)
      interleave(rows[i], rows[i + n / 2], next[2 * i], next[2 * i + 1], std::make_index_sequence<n>());
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

// weight [gates, units, K]: every unit's row becomes a lane.
template <class T>
void pack_rows(const T* weight, const PackedShape& s, int64_t block, Compute<T>* packed) {
  using S = Compute<T>;
  constexpr int kLanes = Vec<S>::kLanes;
  packed += block * s.block_pairs * s.pair_size;
  const int64_t columns = s.block_pairs * kPair;
  for (int64_t column = 0; column < columns; ++column) {
    const int64_t g = column % s.gates, j = (s.first_vector(block) + column / s.gates) * kLanes;
    const int lanes = s.units - j < kLanes ? static_cast<int>(s.units - j) : kLanes;
    const T* source = weight + (g * s.units + j) * s.K;
    S* target = packed + column / kPair * s.pair_size + column % kPair * kLanes;
    for (int64_t k = 0; k < s.K; k += kLanes) {
      const int width = s.K - k < kLanes ? static_cast<int>(s.K - k) : kLanes;
      Vec<S> square[kLanes];
      for (int lane = 0; lane < kLanes; ++lane)
        square[lane] = lane < lanes ? load(source + lane * s.K + k, width) : Vec<S>(S(0));
      transpose<S>(square);
      for (int i = 0; i < width; ++i) store(target + (k + i) * kPair * kLanes, square[i], kLanes);
    }
  }
}

// Rows of a matrix: `apart` elements apart, or of each an address, these `apart` addresses apart.
template <class T>
struct MatrixRows {
  const T* first;
  const void* const* list;  // null: no list
  int64_t apart;

  MatrixRows(const void* rows, int64_t apart_, bool is_list = false)
      : first(is_list ? nullptr : static_cast<const T*>(rows)),
        list(is_list ? static_cast<const void* const*>(rows) : nullptr),
        apart(apart_) {}
  const T* operator[](int64_t k) const { return list ? static_cast<const T*>(list[k * apart]) : first + k * apart; }
};

// weight [K, units]: one gate, every row already holds the lanes side by side.
template <class T>
void pack_columns(const MatrixRows<T>& weight, const PackedShape& s, int64_t block, Compute<T>* packed) {
  using S = Compute<T>;
  constexpr int kLanes = Vec<S>::kLanes;
  packed += block * s.pair_size;
  const int64_t j = s.first_vector(block) * kLanes, left = s.units - j;
  const int first = left < kLanes ? static_cast<int>(left) : kLanes;
  const int second = left - first < kLanes ? static_cast<int>(left - first) : kLanes;
  for (int64_t k = 0; k < s.K; ++k) {
    const T* source = weight[k] + j;
    store(packed + k * kPair * kLanes, load(source, first), kLanes);
    store(packed + k * kPair * kLanes + kLanes, second ? load(source + kLanes, second) : Vec<S>(S(0)), kLanes);
  }
}

// sums [R][2 P][lanes] (+)= R rows of the panel times P pairs of columns, for K steps of k. `row_sums`: elements
// between rows of the sums. Meanwhile the weights `ahead` elements further on (0: none) are fetched into L2: by itself
// the processor would begin anew in every page.
template <class S, int R, int P>
void product_tile(const S* panel, int64_t stride, const S* packed, int64_t pair_size, int64_t K, bool add, S* sums,
                  int64_t row_sums, int64_t ahead) {
  using V = Vec<S>;
  constexpr int kLanes = V::kLanes, C = kPair * P;
  V sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[r][c] = V(S(0));
  const S* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) row[r] = panel + r * stride;
#pragma GCC unroll 4
  for (int64_t k = 0; k < K; ++k) {
    V w[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) w[c] = load(packed + c / kPair * pair_size + (k * kPair + c % kPair) * kLanes, kLanes);
    if (ahead != 0)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) __builtin_prefetch(packed + p * pair_size + k * kPair * kLanes + ahead, 0, 2);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V h(row[r][k]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[r][c] = fma(h, w[c], sum[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      S* target = sums + r * row_sums + c * kLanes;
      store(target, add ? load(target, kLanes) + sum[r][c] : sum[r][c], kLanes);
    }
}

template <class S>
using ProductTile = void (*)(const S* panel, int64_t stride, const S* packed, int64_t pair_size, int64_t K, bool add,
                             S* sums, int64_t row_sums, int64_t ahead);

// Pairs of columns of a tile of R rows: as many as fill the registers (16, with AVX-512 32) with sums, beside one
// weight or broadcast each.
constexpr int tile_pairs(int rows) {
  if (kVectorBytes == 64) return rows <= 2 ? 4 : 2;
  return rows == 1 ? 4 : rows <= 3 ? 2 : 1;
}

template <class S, int R, int P>
ProductTile<S> tile_of_pairs(int64_t pairs) {
  if constexpr (P == 1)
    return product_tile<S, R, 1>;
  else
    return pairs >= P ? product_tile<S, R, P> : tile_of_pairs<S, R, P - 1>(pairs);
}
template <class S>
ProductTile<S> tile_of(int64_t rows, int64_t pairs) {
  switch (rows) {
    case 1:
      return tile_of_pairs<S, 1, tile_pairs(1)>(pairs);
    case 2:
      return tile_of_pairs<S, 2, tile_pairs(2)>(pairs);
    case 3:
      return tile_of_pairs<S, 3, tile_pairs(3)>(pairs);
    case 4:
      return tile_of_pairs<S, 4, tile_pairs(4)>(pairs);
    case 5:
      return tile_of_pairs<S, 5, tile_pairs(5)>(pairs);
    default:
      return tile_of_pairs<S, 6, tile_pairs(6)>(pairs);
  }
}

// Rows [first, last) in parts of at most `most`, of near equal size: f(begin, rows).
template <class F>
FASTRNN_INLINE void for_parts(int64_t first, int64_t last, int64_t most, F f) {
  const int64_t rows = last - first;
  if (rows <= most) {
    if (rows > 0) f(first, rows);
    return;
  }
  const int64_t parts = ceil_div(rows, most);
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t begin = first + rows * i / parts;
    f(begin, first + rows * (i + 1) / parts - begin);
  }
}

// sums = rows of the panel times blocks [begin, end) of a packed matrix; at most kMaxRunRows and kMaxRunPairs.
template <class S>
void product(const S* panel, int64_t stride, int64_t rows, const S* packed, const PackedShape& s, int64_t begin,
             int64_t end, S* sums) {
  constexpr int kLanes = Vec<S>::kLanes;
  const int64_t pairs = (end - begin) * s.block_pairs, row_sums = s.columns(begin, end) * kLanes;
  packed += begin * s.block_pairs * s.pair_size;
  const int64_t most_rows = rows < kMaxRows ? rows : kMaxRows;
  const int64_t step = tile_pairs(static_cast<int>(most_rows));
  for (int64_t pair = 0; pair < pairs; pair += step) {
    const int64_t now = pairs - pair < step ? pairs - pair : step;
    int64_t k = 0;
    do {  // also once where K is 0, which makes the sums 0
      const int64_t K = s.K - k < kChunk ? s.K - k : kChunk;
      const int64_t ahead = !s.is_large ? 0 : kChunk < s.K ? kChunk * kPair * kLanes : now * s.pair_size;
      for_parts(0, rows, kMaxRows, [&](int64_t first, int64_t count) {
        tile_of<S>(count, now)(panel + first * stride + k, stride, packed + pair * s.pair_size + k * kPair * kLanes,
                               s.pair_size, K, k > 0, sums + first * row_sums + pair * kPair * kLanes, row_sums,
                               first == 0 ? ahead : 0);
      });
      k += kChunk;
    } while (k < s.K);
  }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
