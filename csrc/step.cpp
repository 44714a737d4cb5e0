#include "step.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "cpu/kernels.h"
#include "cpu/scan_cpu.h"

namespace fastrnn {
namespace {

// Memory that a thread keeps from step to step.
class Kept {
 public:
  char* get(size_t bytes) {
    if (bytes > size_) {
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      if (!memory_) throw std::bad_alloc();
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

int index_of(const std::string& name, std::initializer_list<const char*> names) {
  int i = 0;
  for (const char* known : names) {
    if (name == known) return i;
    ++i;
  }
  throw std::invalid_argument("fastrnn: unknown name '" + name + "'");
}

const void* array(uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* mutable_array(uintptr_t address) { return reinterpret_cast<void*>(address); }

// Weights from which on another thread pays for an input product.
constexpr int64_t kMinWeightsPerThread = 1 << 18;

}  // namespace

Step::Step(const std::string& cell, const std::string& dtype, const std::string& weight_type, int64_t I, int64_t H,
           int64_t P, std::vector<StepLayer> layers)
    : shape_(), I_(I), layers_(std::move(layers)) {
  shape_.cell = static_cast<CellId>(index_of(cell, {"rnn_tanh", "rnn_relu", "lstm", "gru"}));
  shape_.dtype = static_cast<Dtype>(index_of(dtype, {"float32", "float64", "bfloat16", "float16"}));
  shape_.weight_type = static_cast<WeightType>(index_of(weight_type, {"storage", "bfloat16", "int8"}));
  shape_.T = 1, shape_.D = 1, shape_.H = H, shape_.P = P;
  shape_.direction = Direction::kForward;
}

// gates [rows, G * H] = x [rows, K] * weight_ih^T, a few rows at a time
void Step::input_product(const StepLayer& layer, const void* x, int64_t rows, int64_t K, char* gates) const {
  const size_t item = shape_.dtype == Dtype::kDouble ? 8 : shape_.dtype == Dtype::kFloat ? 4 : 2;
  const size_t compute = shape_.dtype == Dtype::kDouble ? 8 : 4;
  const int64_t columns = kCells[static_cast<int>(shape_.cell)].gates * shape_.H;
  const int64_t blocks = (columns + kLinearBlock - 1) / kLinearBlock;
  for (int64_t r = 0; r < rows; r += kMaxLinearRows) {
    const LinearArgs linear{shape_.dtype,
                            shape_.weight_type,
                            static_cast<const char*>(x) + static_cast<size_t>(r * K) * item,
                            array(layer.weight_ih),
                            array(layer.scale_ih),
                            gates + static_cast<size_t>(r * columns) * compute,
                            rows - r < kMaxLinearRows ? rows - r : kMaxLinearRows,
                            columns,
                            K};
    if (columns * K < 2 * kMinWeightsPerThread)
      cpu_kernels().linear(linear, 0, blocks);
    else
      torch::stable::parallel_for(0, blocks, 1 + kMinWeightsPerThread / (kLinearBlock * K),
                                  [&](int64_t begin, int64_t end) { cpu_kernels().linear(linear, begin, end); });
  }
}

void Step::run(int64_t T, int64_t B, uintptr_t input, uintptr_t h, uintptr_t c, uintptr_t output, uintptr_t h_n,
               uintptr_t c_n) const {
  if (T == 0 || B == 0) return;
  static thread_local Kept gates_memory, scratch_memory, output_memory[2];
  ScanArgs a{};
  static_cast<ScanShape&>(a) = shape_;
  a.T = T, a.B = B, a.N = T * B;
  const int64_t G = kCells[static_cast<int>(a.cell)].gates;
  const bool has_c = kCells[static_cast<int>(a.cell)].has_c;
  const size_t item = a.dtype == Dtype::kDouble ? 8 : a.dtype == Dtype::kFloat ? 4 : 2;
  const size_t h_bytes = static_cast<size_t>(B * a.P) * item, c_bytes = static_cast<size_t>(B * a.H) * item;
  char* const gates = gates_memory.get(static_cast<size_t>(a.N * G * a.H) * (a.dtype == Dtype::kDouble ? 8 : 4));
  a.gates = gates;
  const void* x = array(input);
  for (size_t i = 0; i < layers_.size(); ++i) {
    const StepLayer& layer = layers_[i];
    input_product(layer, x, a.N, i == 0 ? I_ : a.P, gates);
    const void *weight_hh = array(layer.weight_hh), *bias_ih = array(layer.bias_ih), *bias_hh = array(layer.bias_hh),
               *weight_hr = array(layer.weight_hr);
    const float* scale_hh = static_cast<const float*>(array(layer.scale_hh));
    a.weight_hh = &weight_hh, a.scale_hh = &scale_hh;
    a.bias_ih = bias_ih ? &bias_ih : nullptr, a.bias_hh = bias_hh ? &bias_hh : nullptr;
    a.weight_hr = weight_hr ? &weight_hr : nullptr, a.projected = weight_hr != nullptr;
    a.h0 = h ? array(h + i * h_bytes) : nullptr, a.c0 = h && has_c ? array(c + i * c_bytes) : nullptr;
    a.h_n = mutable_array(h_n + i * h_bytes), a.c_n = has_c ? mutable_array(c_n + i * c_bytes) : nullptr;
    const bool last = i + 1 == layers_.size();
    a.output = last ? mutable_array(output) : output_memory[i % 2].get(static_cast<size_t>(T) * h_bytes);
    scan_cpu(a, [](size_t bytes) { return scratch_memory.get(bytes); });
    x = a.output;
  }
}

}  // namespace fastrnn
