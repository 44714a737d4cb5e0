#include "program.h"

#include <list>
#include <mutex>
#include <utility>

#include "plan.h"

namespace fastrnn::cuda {
namespace {

struct Kept {
  std::mutex mutex;
  std::list<std::pair<std::string, std::unique_ptr<StepMemory>>> memories;  // the one used last first
  std::unique_ptr<Recorder> recorder;
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
  for (auto entry = all.memories.begin(); entry != all.memories.end(); ++entry) {
    if (entry->first != key) continue;
    std::unique_ptr<StepMemory> memory = std::move(entry->second);
    all.memories.erase(entry);
    return memory;
  }
  return nullptr;
}

void keep_memory(const std::string& key, std::unique_ptr<StepMemory> memory) {
  std::list<std::pair<std::string, std::unique_ptr<StepMemory>>> gone;  // destroyed without the lock
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.memories.emplace_front(key, std::move(memory));
  int64_t bytes = 0;
  size_t count = 0;
  for (auto entry = all.memories.begin(); entry != all.memories.end();) {
    const auto next = std::next(entry);
    const int64_t more = entry->second->bytes();
    if (count == kMostPrograms || bytes + more > kMostProgramBytes)
      gone.splice(gone.end(), all.memories, entry);
    else
      ++count, bytes += more;
    entry = next;
  }
}

size_t kept_memories() {
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.memories.size();
}

}  // namespace fastrnn::cuda
