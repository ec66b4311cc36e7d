// Memory that one launch of a function leaves to the next, kept from call to call.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>

namespace llmc::rocm {

// Of one device. hipFree waits for the device, so what is given back stays here. All work goes
// through one stream: what the next call writes is written after the last one has read.
class Workspaces {
 public:
  void* Allocate(size_t bytes);  // throws RuntimeError where memory is short
  void Free(void* address);
  void Release();  // gives what is idle back to the driver

 private:
  void ReleaseIdle();

  std::mutex mutex_;
  std::multimap<size_t, void*> idle_;  // by size
  std::map<void*, size_t> used_;
};

// At least one byte of the current device's memory; both throw RuntimeError.
void* Malloc(size_t bytes);
void Free(void* address);

}  // namespace llmc::rocm
