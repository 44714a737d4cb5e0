// The recurrent product on packed weights: rows of a panel times a matrix, one register tile at a time.
//
// Computes   acc[b, c] = sum_k panel[b, k] * weight[k, c]
// Work       a tile of up to kMaxRows rows and kMaxColumns vectors of columns, all K of it
// Memory     the tile in registers (6 x 4 of 32, or 3 x 4 of 16); weights are read once per tile, in order
// Order      k ascending, one accumulator: a result depends neither on the tile nor on the other rows
//
// A packed matrix serves `units` hidden units with `gates` columns each. A block holds all gates of kMaxColumns / gates
// vectors of units (the last block may hold fewer), so that a cell finds every gate of its units in one tile.
#pragma once

#include "vec.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// AVX-512 has 32 registers: 6 x 4 sums, 4 weights or broadcasts in flight. AVX2 and SSE have 16: 3 x 4 + 4.
constexpr int kMaxRows = kVectorBytes == 64 ? 6 : 3;
constexpr int kMaxColumns = 4;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct PackedShape {
  int64_t units, gates, K;
  int lanes;

  int64_t vectors() const { return ceil_div(units, lanes); }
  int64_t block_vectors() const { return kMaxColumns / gates; }
  int64_t blocks() const { return ceil_div(vectors(), block_vectors()); }
  int64_t first_vector(int64_t block) const { return block * block_vectors(); }
  int64_t vectors_in(int64_t block) const {
    const int64_t left = vectors() - first_vector(block);
    return left < block_vectors() ? left : block_vectors();
  }
  int64_t offset(int64_t block) const { return first_vector(block) * gates * K * lanes; }
  int64_t size() const { return vectors() * gates * K * lanes; }
};

// weight [gates, units, K]: every unit's row becomes a lane. Transposed in squares that stay in L1.
template <class T>
void pack_rows(const T* weight, const PackedShape& s, int64_t block, Compute<T>* packed) {
  using S = Compute<T>;
  constexpr int kLanes = Vec<S>::kLanes;
  const int64_t vectors = s.vectors_in(block), columns = vectors * s.gates;
  packed += s.offset(block);
  for (int64_t u = 0; u < vectors; ++u) {
    const int64_t j = (s.first_vector(block) + u) * kLanes;
    const int lanes = s.units - j < kLanes ? static_cast<int>(s.units - j) : kLanes;
    for (int64_t g = 0; g < s.gates; ++g) {
      const T* source = weight + (g * s.units + j) * s.K;
      S* target = packed + (u * s.gates + g) * kLanes;
      for (int64_t k = 0; k < s.K; k += kLanes) {
        const int width = s.K - k < kLanes ? static_cast<int>(s.K - k) : kLanes;
        alignas(64) S square[kLanes][kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          const Vec<S> row = lane < lanes ? load(source + lane * s.K + k, width) : Vec<S>(S(0));
          store(square[lane], row, kLanes);
        }
        for (int i = 0; i < width; ++i) {
          alignas(64) S column[kLanes];
          for (int lane = 0; lane < kLanes; ++lane) column[lane] = square[lane][i];
          store(target + (k + i) * columns * kLanes, load(column, kLanes), kLanes);
        }
      }
    }
  }
}

// weight [K, units]: one gate, every row already holds the lanes side by side.
template <class T>
void pack_columns(const T* weight, const PackedShape& s, int64_t block, Compute<T>* packed) {
  using S = Compute<T>;
  constexpr int kLanes = Vec<S>::kLanes;
  const int64_t vectors = s.vectors_in(block), j = s.first_vector(block) * kLanes;
  packed += s.offset(block);
  for (int64_t k = 0; k < s.K; ++k) {
    for (int64_t u = 0; u < vectors; ++u) {
      const int64_t left = s.units - j - u * kLanes;
      const int lanes = left < kLanes ? static_cast<int>(left) : kLanes;
      store(packed + (k * vectors + u) * kLanes, load(weight + k * s.units + j + u * kLanes, lanes), kLanes);
    }
  }
}

template <class S, int R, int C>
void product_tile(const S* panel, int64_t stride, const S* packed, int64_t K, S* acc) {
  using V = Vec<S>;
  constexpr int kLanes = V::kLanes;
  V sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = V(S(0));
  for (int64_t k = 0; k < K; ++k) {
    V h[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) h[r] = V(panel[r * stride + k]);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const V w = load(packed + (k * C + c) * kLanes, kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][c] = fma(h[r], w, sum[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(acc + (r * C + c) * kLanes, sum[r][c], kLanes);
}

template <class S>
using ProductTile = void (*)(const S* panel, int64_t stride, const S* packed, int64_t K, S* acc);

template <class S, int R>
ProductTile<S> product_of_columns(int64_t columns) {
  constexpr ProductTile<S> kTiles[kMaxColumns] = {product_tile<S, R, 1>, product_tile<S, R, 2>, product_tile<S, R, 3>,
                                                  product_tile<S, R, 4>};
  return kTiles[columns - 1];
}

// acc [rows, columns of the block, lanes] = panel rows * block. `stride`: elements between rows of the panel.
template <class S>
FASTRNN_INLINE void product(const S* panel, int64_t stride, int64_t rows, const S* packed, const PackedShape& s,
                            int64_t block, S* acc) {
  const int64_t columns = s.vectors_in(block) * s.gates;
  ProductTile<S> tile;
  switch (rows) {
    case 1:
      tile = product_of_columns<S, 1>(columns);
      break;
    case 2:
      tile = product_of_columns<S, 2>(columns);
      break;
#if defined(__AVX512F__)
    case 3:
      tile = product_of_columns<S, 3>(columns);
      break;
    case 4:
      tile = product_of_columns<S, 4>(columns);
      break;
    case 5:
      tile = product_of_columns<S, 5>(columns);
      break;
#endif
    default:
      tile = product_of_columns<S, kMaxRows>(columns);
  }
  tile(panel, stride, packed + s.offset(block), s.K, acc);
}

// Rows [first, last) in tiles of near equal size.
template <class F>
FASTRNN_INLINE void for_tiles(int64_t first, int64_t last, F f) {
  const int64_t rows = last - first, tiles = ceil_div(rows, kMaxRows);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = first + rows * i / tiles;
    f(begin, first + rows * (i + 1) / tiles - begin);
  }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
