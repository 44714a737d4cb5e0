// Tests of where the numbers of a product lie (csrc/cuda/fragments.h, exchange.h), which are proven when this is
// compiled, and of the products of a block (grid_products.h) against sums in float64. Prints a line for each, fails if
// one does; built and run by tests/test_grid_protocol.py. No torch.
#include <algorithm>

#include "cuda/grid_products.h"
#include "litmus.h"

using namespace fastrnn::cuda;

namespace {

// Whether place(i) for i < kCount is each of 0 .. kCount - 1 once.
template <int kCount, class Place>
constexpr bool is_one_to_one(Place place) {
  bool taken[kCount] = {};
  for (int i = 0; i < kCount; ++i) {
    const int at = place(i);
    if (at < 0 || at >= kCount || taken[at]) return false;
    taken[at] = true;
  }
  return true;
}
// Whether kCount places lie in different banks of shared memory.
template <class Place>
constexpr bool has_no_conflict(Place place) {
  bool taken[32] = {};
  for (int i = 0; i < 32; ++i) {
    if (taken[place(i) % 32]) return false;
    taken[place(i) % 32] = true;
  }
  return true;
}

// i: lane, and which of its four.
static_assert(is_one_to_one<kSumsOfProduct>([](int i) {
  return Lane(i / 4).sum_row(i % 4) * kProductColumns + Lane(i / 4).sum_column(i % 4);
}));
// i: product, lane, and which of its four words; 16 rows of 16 words.
static_assert(is_one_to_one<256>([](int i) {
  return Lane(i / 4 % 32).weight_row(i % 4) * 16 + Lane(i / 4 % 32).weight_word(i / 128, i % 4);
}));
static_assert(is_one_to_one<kWordsOfBlock>([](int i) { return Lane(i / 4).operand_place() + i % 4; }));
static_assert(is_one_to_one<kWordsOfBlock>([](int i) {
  return Lane(i / 4).r * 16 + Lane(i / 4).operand_word() + i % 4;
}));
// The words that meet in a product: of the weights word i, of the operand 2 tile + i / 2 of the thread's four.
static_assert([] {
  for (int i = 0; i < 256; ++i) {
    const int tile = i / 128, j = i % 4;
    const Lane lane(i / 4 % 32);
    if (lane.weight_word(tile, j) != lane.operand_place() % 16 + 2 * tile + j / 2) return false;
  }
  return true;
}());
static_assert([] {
  for (int i = 0; i < 256; ++i)
    if (Lane(i).warp != i / 32 || Lane(i).r != Lane(i % 32).r || Lane(i).q != Lane(i % 32).q) return false;
  return true;
}());

static_assert(is_one_to_one<kSumsOfProduct>([](int i) { return sum_place(i / 8, i % 8); }));
static_assert([] {
  for (int i = 0; i < 4; ++i)  // written at a time, by all lanes
    if (!has_no_conflict([=](int lane) { return sum_place(Lane(lane).sum_row(i), Lane(lane).sum_column(i)); }))
      return false;
  for (int pair = 0; pair < 4; ++pair)  // read at a time, by the threads of a row group: 16 rows of two columns
    if (!has_no_conflict([=](int i) { return sum_place(i % 16, 2 * pair + i / 16); })) return false;
  return true;
}());

// Every word of the mailbox is that of one publication, tile, and block of k.
void test_mailbox() {
  const int D = 2;
  Mailbox mail{};
  mail.slots = 4, mail.window = 2, mail.tiles = 3, mail.k_blocks = 5, mail.publications = 7;
  std::vector<uint32_t> words(static_cast<size_t>(D * mail.slots * mail.words_of_slot()));
  std::vector<uint32_t> flags(static_cast<size_t>(D * mail.tiles * mail.publications));
  mail.words = words.data(), mail.flags = flags.data();
  bool inside = true;
  const auto is_inside = [](const std::vector<uint32_t>& array, const uint32_t* place, int64_t count) {
    return place >= array.data() && place + count <= array.data() + array.size();
  };
  for (int d = 0; d < D; ++d)
    for (int tile = 0; tile < mail.tiles; ++tile) {
      for (int n = 8; n < 12; ++n) {
        uint32_t* const operand = mail.operand(d, n, tile);
        inside &= operand == mail.operand(d, n + mail.slots, tile) &&
                  is_inside(words, operand, mail.k_blocks * kWordsOfBlock);
        for (int i = 0; inside && i < mail.k_blocks * kWordsOfBlock; ++i) ++operand[i];
      }
      for (int n = 0; n < mail.publications; ++n) {
        inside &= is_inside(flags, mail.flag(d, n, tile), 1);
        if (inside) ++*mail.flag(d, n, tile);
      }
    }
  const auto once = [](const std::vector<uint32_t>& array) {
    return std::all_of(array.begin(), array.end(), [](uint32_t count) { return count == 1; });
  };
  expect("mailbox: inside, slots come again", inside);
  expect("mailbox: each word once, each flag once", once(words) && once(flags));
}

// Packed weights: each word of the rows of all blocks once, and none beyond the last block of k but to fill up.
template <class Core>
void test_weight_places(const std::string& name) {
  bool all = true;
  for (const int k_blocks : {1, 5, 8, 9, 20})
    for (const int outputs : {1, 3, 4}) {
      const int unit_blocks = 3, padded = (k_blocks + kGridWarps - 1) / kGridWarps * kGridWarps;
      std::vector<int> counts(static_cast<size_t>(unit_blocks * outputs * 16 * padded * 16));
      all &= WeightPlace::words(unit_blocks, k_blocks, outputs) == static_cast<int64_t>(counts.size());
      for (int64_t item = 0; all && item < static_cast<int64_t>(counts.size()); ++item) {
        const WeightPlace at(item, k_blocks, outputs);
        const int row = Core::weight_row(at.thread, at.half, at.i), word = Core::weight_word(at.thread, at.half, at.i);
        all &= at.unit_block < unit_blocks && at.output < outputs && row < 16 && at.k_block < padded && word < 16;
        const int of_row = (at.unit_block * outputs + at.output) * 16 + row;
        if (all) ++counts[static_cast<size_t>((of_row * padded + at.k_block) * 16 + word)];
      }
      for (const int count : counts) all &= count == 1;
    }
  expect("packed weights: each word once, " + name, all);
}

// What multiplies: storage, and the core for so many outputs.
template <class Storage, bool kIsExact = false>
struct Kind {
  using T = Storage;
  static constexpr bool kExact = kIsExact;
  static constexpr int kPerWord = Fragment<T>::kPerWord;
  template <int kOutputs>
  using Core = std::conditional_t<kExact, ExactCore<kOutputs>, TensorCore<T, kOutputs>>;
  static const char* name() {
    return kExact ? "float" : std::is_same_v<T, float> ? "TF32" : std::is_same_v<T, Half> ? "float16" : "bfloat16";
  }
};

// How the products call an exchange.
struct Calls {
  int publication, tile, step;
  int waited = 0, ended = 0;
  bool in_order = true;
  void wait(int n, int of_tile, int of_step) {
    in_order &= n == publication && of_tile == tile && of_step == step && waited == 0 && ended == 0;
    ++waited;
  }
  void end_reading(int n) { in_order &= n == publication && ++ended == 1; }
};
// Words that were published before the kernel began.
struct Published : Calls {
  static constexpr bool kWaitsFirst = true;
  bool is_missing(const uint32_t (&)[4]) const { return false; }
  bool gives_up(int, int) { return in_order = false; }
  void taken(uint32_t (&)[4]) { in_order &= waited == 1 && ended == 0; }
};
// Words that a thread itself publishes, in any order, while it waits for them.
struct Late : Calls {
  static constexpr bool kWaitsFirst = false;
  const Block& block;
  HostRandom& random;
  std::vector<std::pair<uint32_t*, uint32_t>> words;  // and what is to come there
  bool is_missing(const uint32_t (&loaded)[4]) const { return std::find(loaded, loaded + 4, kNotThere) != loaded + 4; }
  bool gives_up(int spins, int of_step) {
    in_order &= of_step == step && spins < 1000;
    for (int64_t n = random.below(4); n > 0 && !words.empty(); --n) {
      std::swap(words[static_cast<size_t>(random.below(static_cast<int64_t>(words.size())))], words.back());
      block.store(words.back().first, words.back().second);
      words.pop_back();
    }
    return !in_order;
  }
  void taken(uint32_t (&)[4]) { in_order &= ended == 0; }
};

// Weights and two operands, of multiples of 1/8: their products and all sums of them are exact. With float as it is odd
// rows of weights, and odd columns of operands, have more bits than TF32; sums of one with the other are not exact.
template <class Kind>
struct Numbers {
  using T = typename Kind::T;
  static constexpr int kPerWord = Kind::kPerWord;
  struct alignas(16) Line {
    uint32_t words[4];
  };
  int k_blocks, outputs;
  std::vector<double> weights, operands;  // [outputs, 16, k], [2, 8, k]
  std::vector<Line> packed;               // of two blocks of units, of which the second one has the weights
  std::vector<Line> mailbox;              // [2, k_blocks, 8, 16] words
  int k() const { return k_blocks * Fragment<T>::kBlock; }

  Numbers(int outputs, int k_blocks, HostRandom& random)
      : k_blocks(k_blocks),
        outputs(outputs),
        packed(static_cast<size_t>(WeightPlace::words(2, k_blocks, outputs) / 4), Line{{~0u, ~0u, ~0u, ~0u}}),
        mailbox(static_cast<size_t>(2 * k_blocks * kWordsOfBlock / 4)) {
    const auto draw = [&](int row) {
      if (!Kind::kExact) return static_cast<double>(random.below(17) - 8) / 8;
      return static_cast<double>(random.below(3) - 1) * (row % 2 == 0 ? 1 : 1 + 0x1p-12);
    };
    for (int i = 0; i < outputs * 16 * k(); ++i) weights.push_back(draw(i / k()));
    for (int i = 0; i < 2 * 8 * k(); ++i) operands.push_back(draw(i / k()));
    for (int64_t item = 0; item < WeightPlace::words(2, k_blocks, outputs); ++item) {
      const WeightPlace at(item, k_blocks, outputs);
      if (at.unit_block != 1 || at.k_block >= k_blocks) continue;
      using Core = typename Kind::template Core<1>;
      const int row = Core::weight_row(at.thread, at.half, at.i), word = Core::weight_word(at.thread, at.half, at.i);
      packed[static_cast<size_t>(item / 4)].words[item % 4] = Core::weight(
          word_at(weights, (at.output * 16 + row) * k() + at.k_block * Fragment<T>::kBlock + word * kPerWord));
    }
  }
  // A word of the operand: of a block of k, [8, 16].
  uint32_t word_of_operand(int n, int word) const {
    const int k_block = word / kWordsOfBlock, row = word / 16 % 8;
    return word_at(operands, (n * 8 + row) * k() + k_block * Fragment<T>::kBlock + word % 16 * kPerWord);
  }
  uint32_t* operand(int n) { return mailbox[static_cast<size_t>(n * k_blocks * kWordsOfBlock / 4)].words; }
  // Of the first operand all words are there, of the second one none.
  void publish() {
    for (int i = 0; i < k_blocks * kWordsOfBlock; ++i) operand(0)[i] = word_of_operand(0, i), operand(1)[i] = kNotThere;
  }
  // With TF32 some word that it rounds to the number.
  static uint32_t word_at(const std::vector<double>& numbers, int place) {
    T narrowed[kPerWord];
    const double* const first = numbers.data() + place;
    for (int i = 0; i < kPerWord; ++i) narrow(static_cast<float>(first[i]), narrowed[i]);
    uint32_t word;
    std::memcpy(&word, narrowed, sizeof word);
    if (std::is_same_v<T, float> && !Kind::kExact && *first != 0)
      word += static_cast<uint32_t>(HostRandom(static_cast<uint64_t>(place)).below(0x2000)) - 0x1000;
    return word;
  }
  double sum(int n, int output, int row, int column) const {
    double sum = 0;
    for (int i = 0; i < k(); ++i)
      sum += weights[static_cast<size_t>((output * 16 + row) * k() + i)] *
             operands[static_cast<size_t>((n * 8 + column) * k() + i)];
    return sum;
  }
};

// The products of a block with two operands, one after the other.
template <class Kind, int kOutputs, int kResident>
struct Multiplies {
  using Products = GridProducts<typename Kind::T, kOutputs, kResident, typename Kind::template Core<kOutputs>>;
  static constexpr int kThreads = kGridThreads;
  static constexpr size_t kGuard = 256;  // words behind what the products ask for
  Numbers<Kind>& numbers;
  HostRandom& random;
  std::vector<float>& sums;  // [2, outputs, 16, 8]
  bool &in_order, &in_place;

  size_t shared_bytes() const { return Products::shared_bytes(numbers.k_blocks) + kGuard * 4; }

  template <class Exchange>
  void multiply(const Block& block, const Products& products, Exchange& exchange, int n) const {
    float* const partials = block.shared<float>() + n * Products::kPartialFloats;
    typename Products::Operands operands = {};
    if (!Exchange::kWaitsFirst) products.start(numbers.operand(n), operands);
    products.multiply(exchange, numbers.operand(n), exchange.publication, exchange.tile, exchange.step, operands,
                      partials);
    in_order &= exchange.in_order && exchange.waited == Exchange::kWaitsFirst && exchange.ended == 1;
    block.sync();
    for (int i = block.thread(); i < kOutputs * kSumsOfProduct; i += kThreads)
      sums[static_cast<size_t>(n * kOutputs * kSumsOfProduct + i)] =
          Products::sum_of(partials, i / kSumsOfProduct, i / 8 % 16, i % 8);
  }
  void operator()(const Block& block) const {
    uint32_t* const more = block.shared<uint32_t>() + 2 * Products::kPartialFloats;
    Products products(block, numbers.k_blocks, more);
    products.load_weights(numbers.packed[0].words, 1);
    Published published{{10, 4, 7}};
    multiply(block, products, published, 0);
    Late late{{11, 5, 8}, block, random, {}};
    const Lane lane(block.thread());
    for (int k_block = lane.warp; k_block < numbers.k_blocks; k_block += kGridWarps)
      for (int i = 0; i < 4; ++i) {
        const int word = k_block * kWordsOfBlock + lane.operand_place() + i;
        late.words.push_back({numbers.operand(1) + word, numbers.word_of_operand(1, word)});
      }
    multiply(block, products, late, 1);
    block.sync();
    if (block.thread() != 0) return;
    // All partial sums are written, of the weights as many words as registers do not hold, and nothing behind.
    const auto written = [&](const uint32_t* from, size_t words) {
      return words - static_cast<size_t>(std::count(from, from + words, 0xFFFFFFFF));
    };
    const size_t words = Products::shared_bytes(numbers.k_blocks) / 4, partials = 2 * Products::kPartialFloats;
    const int in_memory = std::max(0, numbers.k_blocks - kGridWarps * kResident);
    const int staged = Kind::kExact ? 2 * kGridWarps : 0;
    in_place &= written(block.shared<uint32_t>(), partials) == partials;
    in_place &=
        written(more, words - partials) == static_cast<size_t>((in_memory * 2 * kOutputs + staged) * kWordsOfBlock);
    in_place &= written(block.shared<uint32_t>() + words, kGuard) == 0;
  }
};

template <class Kind, int kOutputs, int kResident>
void test_products() {
  constexpr int kHeld = kGridWarps * kResident;
  HostRandom random(kResident * 5 + kOutputs);
  bool same = true, in_order = true, in_place = true;
  for (const int k_blocks : {1, 5, kHeld - 3, kHeld, kHeld + 1, kHeld + 43}) {
    Numbers<Kind> numbers(kOutputs, k_blocks, random);
    for (const bool weak : {false, true}) {
      host_schedule.weak = weak;
      numbers.publish();
      std::vector<float> sums(2 * kOutputs * kSumsOfProduct, -1.0f);
      HostGrid::run(Multiplies<Kind, kOutputs, kResident>{numbers, random, sums, in_order, in_place}, 1, 1);
      for (int i = 0; i < 2 * kOutputs * kSumsOfProduct; ++i)
        same &= (Kind::kExact && i % 2 == 1 && i / 8 % 2 == 1) ||
                sums[static_cast<size_t>(i)] ==
                    numbers.sum(i / (kOutputs * kSumsOfProduct), i / kSumsOfProduct % kOutputs, i / 8 % 16, i % 8);
    }
  }
  const std::string name = std::string("products: ") + Kind::name() + ", " + std::to_string(kOutputs) +
                           " outputs, of each warp " + std::to_string(kResident) + " blocks of k in registers";
  expect(name, same);
  expect(name + ": calls", in_order);
  expect(name + ": shared memory", in_place);
}

// As the kernels have them: of a forward pass a product for each gate, of a backward pass one.
template <class Kind>
void test_all_products() {
  constexpr int kBlocks = grid_blocks(Kind::kExact);
  test_weight_places<typename Kind::template Core<1>>(Kind::name());
  test_products<Kind, 4, kBlocks>();
  test_products<Kind, 3, kBlocks>();
  test_products<Kind, 1, kBlocks>();
  test_products<Kind, 1, kBlocks * 3>();
  test_products<Kind, 1, kBlocks * 4>();
}

}  // namespace

int main() {
  try {
    test_mailbox();
    test_all_products<Kind<BFloat16>>();
    test_products<Kind<Half>, 4, grid_blocks(false)>();
    test_all_products<Kind<float>>();
    test_all_products<Kind<float, true>>();
  } catch (const std::exception& error) {
    expect("all tests run", false, error.what());
  }
  return failures != 0;
}
