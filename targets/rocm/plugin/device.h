// The machine's ROCm devices, as HIP counts them.
#pragma once

#include <cstddef>
#include <string>

#include "hip_api.h"

namespace llmc::rocm {

struct DeviceInfo {
  std::string name;
  std::string architecture;
};

int NumDevices();  // 0 where HIP does not work

// Throws ValueError for a wrong index.
const DeviceInfo& Describe(int index);

// Makes `index` the device of this thread's calls; throws RuntimeError where HIP does not work.
void Use(int index);

// The device that this thread's kernels run on, and the stream that they run in.
int CurrentDevice();
hipStream CurrentStream(int index);

}  // namespace llmc::rocm
