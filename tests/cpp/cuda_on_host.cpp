// The kernels of csrc/cuda built for the host, and a device of them for tensors on the CPU: with ops.cpp and
// the rest of csrc/cuda this is the pass of a GPU but for the machine, as torch.ops.fastrnn_cuda_on_host.
#include <atomic>

#include "cuda/device.h"
#include "cuda/program.h"
#include "cuda/step_kernels.inl"
#include "host_grid.h"

namespace fastrnn {
namespace cuda {

// Threads have no order: odd ones first, from the last on, then even ones, and the groups from the last on.
template <class Kernel>
void launch(const Kernel& kernel, int64_t items, int64_t groups, Queue) {
  check_grid(items, groups);
  for (int64_t group = groups - 1; group >= 0; --group)
    for (int64_t odd : {1, 0})
      for (int64_t item = items - 1; item >= 0; --item)
        if (item % 2 == odd) kernel({item, group});
}

namespace {

std::atomic<int64_t> recorded{0}, run{0};
std::atomic<bool> allowed{true}, tf32{false};
uint32_t report = 0;

// Few multiprocessors: blocks get several tiles, and groups that do not find room run one after the other.
const GpuLimits gpu = {9, 12, 227 << 10};

// Programs run what was recorded, with the values that it was recorded with, as a graph does.
class HostProgram : public Program {
 public:
  explicit HostProgram(Recorder::Steps steps) : steps_(std::move(steps)) {}
  void run() override {
    ++cuda::run;
    steps_(nullptr);
  }

 private:
  const Recorder::Steps steps_;
};

class HostRecorder : public Recorder {
 public:
  bool is_ready() override { return allowed; }
  std::unique_ptr<Program> record(const Steps& steps) override {
    ++recorded;
    steps(nullptr);
    return std::make_unique<HostProgram>(steps);
  }
  std::string product_settings() override { return ""; }
  bool allows_tf32() override { return tf32; }
};

const bool has_recorder = (set_recorder(std::make_unique<HostRecorder>()), true);

}  // namespace
}  // namespace cuda

std::unique_ptr<Device> device_of(const Tensor&) {
  return std::make_unique<cuda::KernelDevice>(Place{}, cuda::step_kernels(), cuda::block_kernels(),
                                              cuda::grid_kernels(), nullptr, cuda::gpu,
                                              [](bool) { return &cuda::report; });
}

}  // namespace fastrnn

// For tests: programs recorded, programs run, memories of programs that are kept, blocks run, grids run.
extern "C" __attribute__((visibility("default"))) void fastrnn_programs(int64_t* counts) {
  counts[0] = fastrnn::cuda::recorded, counts[1] = fastrnn::cuda::run;
  counts[2] = static_cast<int64_t>(fastrnn::cuda::kept_memories()), counts[3] = fastrnn::cuda::blocks_run;
  counts[4] = fastrnn::cuda::grids_run;
}

extern "C" __attribute__((visibility("default"))) void fastrnn_allow_programs(int allowed) {
  fastrnn::cuda::allowed = allowed != 0;
}

extern "C" __attribute__((visibility("default"))) void fastrnn_allow_tf32(int allowed) {
  fastrnn::cuda::tf32 = allowed != 0;
}

// The schedules of the next grids, and a word as kernels that give up report it.
extern "C" __attribute__((visibility("default"))) void fastrnn_schedule(int64_t seed) {
  fastrnn::cuda::host_schedule.seed = static_cast<uint64_t>(seed), fastrnn::cuda::host_schedule.launch = 0;
}
extern "C" __attribute__((visibility("default"))) void fastrnn_report(int64_t word) {
  fastrnn::cuda::report = static_cast<uint32_t>(word);
}

extern "C" __attribute__((visibility("default"))) void fastrnn_release_programs() { fastrnn::cuda::release_memories(); }
