#include "program.h"

#include <mutex>
#include <unordered_map>
#include <utility>

#include "sizes.h"

namespace fastrnn::cuda {
namespace {

using Memories = std::unordered_multimap<std::string, std::unique_ptr<StepMemory>>;

struct Kept {
  std::mutex mutex;
  Memories memories;
  int taken = 0;  // by passes that run
  bool release = false;
  std::unique_ptr<Recorder> recorder;

  // All of them, if it is time; to be destroyed without the lock.
  Memories due() {
    int64_t bytes = 0;
    for (const auto& entry : memories) bytes += entry.second->bytes();
    release = release || memories.size() > kMostPrograms || bytes > kMostProgramBytes;
    if (!release || taken > 0) return {};
    release = false;
    return std::exchange(memories, {});
  }
};

// Never destroyed: at the end of the process there may be no GPU any more to give memory back to.
Kept& kept() {
  static Kept* const all = new Kept;
  return *all;
}

}  // namespace

int64_t StepMemory::bytes() const {
  int64_t sum = 0;
  for (const Tensor* t : {&weight, &projection, &state, &product, &inner, &inner_product, &table})
    if (t->defined()) sum += t->numel() * (t->scalar_type() == ScalarType::Byte ? 1 : item_size(t->scalar_type()));
  return sum;
}

Recorder* recorder() { return kept().recorder.get(); }
void set_recorder(std::unique_ptr<Recorder> recorder) { kept().recorder = std::move(recorder); }

std::unique_ptr<StepMemory> take_memory(const std::string& key) {
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  ++all.taken;
  const auto entry = all.memories.find(key);
  if (entry == all.memories.end()) return nullptr;
  std::unique_ptr<StepMemory> memory = std::move(entry->second);
  all.memories.erase(entry);
  return memory;
}

void give_back_memory(const std::string& key, std::unique_ptr<StepMemory> memory) {
  Memories due;
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  --all.taken;
  if (memory) all.memories.emplace(key, std::move(memory));
  due = all.due();
}

void release_memories() {
  Memories due;
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.release = true;
  due = all.due();
}

size_t kept_memories() {
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.memories.size();
}

}  // namespace fastrnn::cuda
