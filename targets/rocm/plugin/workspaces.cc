#include "workspaces.h"

#include "hip_api.h"

namespace llmc::rocm {
namespace {

constexpr size_t kGranularity = 4096;

}  // namespace

void* Malloc(size_t bytes) {
  void* address = nullptr;
  Check(hipMalloc(&address, bytes == 0 ? 1 : bytes),
        "hipMalloc of " + std::to_string(bytes) + " bytes");
  return address;
}

void Free(void* address) {
  hipError result = hipFree(address);
  if (result != kHipErrorDeinitialized) Check(result, "hipFree");
}

void* Workspaces::Allocate(size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t size = (bytes + kGranularity - 1) / kGranularity * kGranularity;
  auto found = idle_.lower_bound(size);
  if (found == idle_.end()) {
    // What is idle is too small, and the next calls will want as much as this one: without it
    // there is never more than the largest call needs.
    ReleaseIdle();
    void* address = Malloc(size);
    used_[address] = size;
    return address;
  }
  void* address = found->second;
  used_[address] = found->first;
  idle_.erase(found);
  return address;
}

void Workspaces::Free(void* address) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = used_.find(address);
  if (found == used_.end()) return;
  idle_.emplace(found->second, address);
  used_.erase(found);
}

void Workspaces::Release() {
  std::lock_guard<std::mutex> lock(mutex_);
  ReleaseIdle();
}

void Workspaces::ReleaseIdle() {
  for (auto& [size, address] : idle_) llmc::rocm::Free(address);
  idle_.clear();
}

}  // namespace llmc::rocm
