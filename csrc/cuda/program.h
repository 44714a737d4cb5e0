// Programs: steps of a pass that are put on the queue at once, and again and again; on a GPU a CUDA graph. A launch
// for kProgramSteps steps where each of them would take two, with what they need looked up by torch every time.
//
// A program works on memory of its own, which is kept with it, and takes everything else from a table in that memory:
// so one serves every call of the same shape, of any length.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "../device.h"
#include "step_kernels.h"

namespace fastrnn::cuda {

class Program {
 public:
  virtual ~Program() = default;
  virtual void run() = 0;  // on the queue that was the current one when it was recorded
};

// Makes programs.
class Recorder {
 public:
  using Steps = std::function<void(Queue)>;

  virtual ~Recorder() = default;
  // Whether programs can be made and run now: not while somebody records the queue.
  virtual bool is_ready() = 0;
  // What `steps` puts on the queue that it is given. It is called more than once, and leaves nothing that is needed.
  virtual std::unique_ptr<Program> record(const Steps& steps) = 0;
  // What torch's products depend on beside their arguments.
  virtual std::string product_settings() = 0;
};

// Of this process; null where there is none.
Recorder* recorder();
void set_recorder(std::unique_ptr<Recorder> recorder);

// What the matrix products of a step read and write, for all rows of a batch:
// product = state weight, inner_product = inner projection; and the program that does so.
struct StepMemory {
  Tensor weight, projection, state, product, inner, inner_product;
  Tensor table;  // of the program
  std::unique_ptr<Program> program;

  int64_t bytes() const;
};

// The memory that was kept under a key, which is then the caller's, or null; keeps it again. Holds at most
// kMostPrograms, and kMostProgramBytes: what was used longest ago goes.
std::unique_ptr<StepMemory> take_memory(const std::string& key);
void keep_memory(const std::string& key, std::unique_ptr<StepMemory> memory);
size_t kept_memories();

}  // namespace fastrnn::cuda
