// What decides the protocol of persistent kernels, measured: one JSON object per line, seconds and bytes per second.
//
//   launch, graph_node   an empty kernel in a stream, as a node of a graph
//   grid_sync            cooperative_groups' barrier of all blocks
//   mailbox              a step of an exchange: every block writes a word, all blocks poll all of them
//   ingest               every block reads the same bytes from the second cache, again and again
//   cluster              a step in a cluster: every block writes to all others' shared memory, then a barrier
//
// Every wait is bounded: a probe that fails says so and leaves its figure out.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace cg = cooperative_groups;

#define CHECK(call)                                                       \
  do {                                                                    \
    const cudaError_t error = (call);                                     \
    if (error != cudaSuccess) {                                           \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error)); \
      std::exit(1);                                                       \
    }                                                                     \
  } while (false)

constexpr int kSteps = 2000, kMostSpins = 1 << 20, kRuns = 7;

__device__ uint32_t load_word(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ void store_word(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__global__ void empty() {}

__global__ void grid_sync(int steps) {
  cg::grid_group grid = cg::this_grid();
  for (int i = 0; i < steps; ++i) grid.sync();
}

// words [2][blocks]: of even and of odd steps.
__global__ void mailbox(uint32_t* words, int steps, int* failed) {
  const int blocks = static_cast<int>(gridDim.x);
  for (int step = 1; step <= steps; ++step) {
    uint32_t* now = words + (step & 1) * blocks;
    if (threadIdx.x == 0) store_word(now + blockIdx.x, static_cast<uint32_t>(step));
    int spins = 0;
    if (static_cast<int>(threadIdx.x) < blocks)
      while (load_word(now + threadIdx.x) != static_cast<uint32_t>(step) && ++spins < kMostSpins) {
      }
    if (__syncthreads_or(spins >= kMostSpins)) {
      if (threadIdx.x == 0) *failed = 1;
      return;
    }
  }
}

__global__ void ingest(const uint4* data, int count, int steps, uint32_t* sink) {
  uint32_t sum = 0;
  for (int step = 0; step < steps; ++step)
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
      uint4 v;
      asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "l"(data + i)
                   : "memory");
      sum += v.x + v.y + v.z + v.w;
    }
  if (sum == 0x12345678) *sink = sum;
}

__global__ void cluster_exchange([[maybe_unused]] int steps, [[maybe_unused]] uint32_t* sink) {
#if __CUDA_ARCH__ >= 900
  __shared__ uint32_t inbox[2][16];
  cg::cluster_group cluster = cg::this_cluster();
  uint32_t sum = 0;
  cluster.sync();
  for (int step = 0; step < steps; ++step) {
    if (threadIdx.x < cluster.num_blocks())
      *cluster.map_shared_rank(&inbox[step & 1][cluster.block_rank()], threadIdx.x) = static_cast<uint32_t>(step);
    cluster.sync();
    if (threadIdx.x < cluster.num_blocks()) sum += inbox[step & 1][threadIdx.x];
  }
  cluster.sync();
  if (sum == 0x12345678) *sink = sum;
#endif
}

// Median of kRuns times of f, in seconds.
template <class F>
double seconds(F f) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int run = -1; run < kRuns; ++run) {
    CHECK(cudaEventRecord(begin));
    f();
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (run >= 0) times.push_back(ms);
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] / 1e3;
}

void say(const char* probe, int size, double value, const char* unit) {
  std::printf("{\"probe\": \"%s\", \"size\": %d, \"value\": %.4g, \"unit\": \"%s\"}\n", probe, size, value, unit);
  std::fflush(stdout);
}

template <class... Parameters, class... Arguments>
void cooperative(void (*kernel)(Parameters...), int blocks, int threads, Arguments... arguments) {
  void* pointers[] = {&arguments...};
  CHECK(
      cudaLaunchCooperativeKernel(reinterpret_cast<void*>(kernel), dim3(blocks), dim3(threads), pointers, 0, nullptr));
}

void launches() {
  say("launch", 1, seconds([] {
                     for (int i = 0; i < kSteps; ++i) empty<<<1, 32>>>();
                   }) / kSteps,
      "s");
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kSteps; ++i) empty<<<1, 32, 0, stream>>>();
  CHECK(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t executable;
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  say("graph_node", 1, seconds([&] { CHECK(cudaGraphLaunch(executable, nullptr)); }) / kSteps, "s");
  CHECK(cudaGraphExecDestroy(executable));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaStreamDestroy(stream));
}

void exchanges(int multiprocessors) {
  uint32_t* words;
  int* failed;
  CHECK(cudaMalloc(&words, 2 * 1024 * sizeof(uint32_t)));
  CHECK(cudaMalloc(&failed, sizeof(int)));
  for (int blocks : {2, 32, 128, multiprocessors}) {
    if (blocks > multiprocessors) continue;
    say("grid_sync", blocks, seconds([&] { cooperative(grid_sync, blocks, 256, kSteps); }) / kSteps, "s");
    CHECK(cudaMemset(failed, 0, sizeof(int)));
    const double time = seconds([&] {
      CHECK(cudaMemsetAsync(words, 0, 2 * 1024 * sizeof(uint32_t)));
      cooperative(mailbox, blocks, 256, words, kSteps, failed);
    });
    int has_failed = 0;
    CHECK(cudaMemcpy(&has_failed, failed, sizeof(int), cudaMemcpyDeviceToHost));
    if (has_failed)
      std::fprintf(stderr, "mailbox of %d blocks: a word did not come\n", blocks);
    else
      say("mailbox", blocks, time / kSteps, "s");
  }
  CHECK(cudaFree(words));
  CHECK(cudaFree(failed));
}

void ingests(int multiprocessors) {
  uint4* data;
  CHECK(cudaMalloc(&data, 64 << 10));
  CHECK(cudaMemset(data, 1, 64 << 10));
  for (int kib : {2, 8, 16, 32, 64}) {
    const int count = kib * 1024 / 16;
    const double time =
        seconds([&] { ingest<<<multiprocessors, 256>>>(data, count, kSteps, reinterpret_cast<uint32_t*>(data)); });
    say("ingest", kib << 10, static_cast<double>(multiprocessors) * kib * 1024 * kSteps / time, "B/s");
  }
  CHECK(cudaFree(data));
}

void clusters() {
  uint32_t* sink;
  CHECK(cudaMalloc(&sink, sizeof(uint32_t)));
  for (int size : {2, 4, 8, 16}) {
    if (size > 8 && cudaFuncSetAttribute(cluster_exchange, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) continue;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(size), config.blockDim = dim3(128), config.attrs = &attribute, config.numAttrs = 1;
    int active = 0;
    if (cudaOccupancyMaxActiveClusters(&active, cluster_exchange, &config) != cudaSuccess || active == 0) {
      cudaGetLastError();
      continue;
    }
    say("clusters_at_once", size, active, "1");
    say("cluster", size, seconds([&] { CHECK(cudaLaunchKernelEx(&config, cluster_exchange, kSteps, sink)); }) / kSteps,
        "s");
  }
  CHECK(cudaFree(sink));
}

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  launches();
  exchanges(device.multiProcessorCount);
  ingests(device.multiProcessorCount);
  if (device.major >= 9) clusters();
  return 0;
}
