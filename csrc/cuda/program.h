// Programs: steps of a pass that are put on the queue at once, and again and again; on a GPU a CUDA graph. Two
// launches, of it and of what writes its table, for kProgramSteps steps where each of them takes two and torch's
// product.
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
  // Whether torch's products of float may be those of TF32.
  virtual bool allows_tf32() = 0;
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

// The memory that was kept under a key, or null. Its taker, or who makes one then, gives it back: the memory, or null
// to keep nothing. At most kMostPrograms are kept, of kMostProgramBytes; where there are more all go, as soon as nobody
// has one: torch clears what the graphs of a stream share when one of them goes.
std::unique_ptr<StepMemory> take_memory(const std::string& key);
void give_back_memory(const std::string& key, std::unique_ptr<StepMemory> memory);
size_t kept_memories();
// Gives all of it back to torch, as soon as nobody has one.
void release_memories();

}  // namespace fastrnn::cuda
