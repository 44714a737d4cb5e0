// Where the numbers of a product lie: in the fragments of a warp (block.h), in the mailbox through which blocks tell
// each other the operand of the next step, and in the shared memory in which the partial sums of warps meet. All of it
// is constexpr, and proven to be one to one by tests/cpp/fragments_test.cpp. No torch headers.
#pragma once

#include <cstdint>

#include "../math.h"

namespace fastrnn::cuda {

// A block of k: as many columns of the weights, rows of the operand, as a warp takes with one load of 16 bytes a
// thread, which are the fragments of two products.
template <class T>
struct Fragment {
  static constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));  // numbers in a word: 2 of 16 bits, 1 float
  static constexpr int kRowWords = 16;                              // words of a row of the operand in a block of k
  static constexpr int kBlock = kRowWords * kPerWord;               // k of a block: 32, 16
};
constexpr int kProductRows = 16;     // of weights: outputs of a product
constexpr int kProductColumns = 8;   // rows of a batch
constexpr int kWordsOfBlock = 128;   // [8 rows, 16 words]
constexpr int kSumsOfProduct = 128;  // [16, 8]

// The place of a thread in its warp, as fragments have it.
struct Lane {
  int warp, r, q;

  explicit constexpr FASTRNN_FN Lane(int thread) : warp(thread / 32), r(thread % 32 / 4), q(thread % 4) {}
  constexpr FASTRNN_FN int column(int i) const { return 2 * q + i; }  // of the product: a row of the batch
  // Of the thread's sum i = 0..3 of a product.
  constexpr FASTRNN_FN int sum_row(int i) const { return r + 8 * (i / 2); }
  constexpr FASTRNN_FN int sum_column(int i) const { return column(i % 2); }

  // The thread's words of row r of the operand in a block of k, the four from here on; and where they lie in the block.
  constexpr FASTRNN_FN int operand_word() const { return 4 * q; }
  constexpr FASTRNN_FN int operand_place() const { return r * Fragment<float>::kRowWords + operand_word(); }
  // Word i = 0..3 of the thread's weights of product `tile` of a block: which row of the weights, and which word of it.
  // So word `half` = i / 2 of the operand, 2 tile + half of the thread's four, meets it.
  constexpr FASTRNN_FN int weight_row(int i) const { return r + 8 * (i % 2); }
  constexpr FASTRNN_FN int weight_word(int tile, int i) const { return operand_word() + 2 * tile + i / 2; }
};

// The place of a sum among those of a product in shared memory: the 32 sums that a warp writes at a time (one of each
// lane) lie in different banks, and so do those that a warp reads at a time (two columns).
constexpr FASTRNN_FN int sum_place(int row, int column) {
  const int low = row % 8, high = row / 8, odd = column % 2, pair = column / 2;
  return 32 * (high + 2 * odd) + low + 8 * ((pair % 2) ^ high) + 16 * ((pair / 2) ^ odd);
}

}  // namespace fastrnn::cuda
