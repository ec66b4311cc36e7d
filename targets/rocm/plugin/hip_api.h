// HIP's functions, found at run time: the plug-in loads where there is no driver.
#pragma once

#include <cstddef>
#include <string>

namespace llmc::rocm {

// Of HIP's header, which is not needed to build this: what its C interface has kept since ROCm 5.
using hipError = int;
using hipStream = void*;
using hipModule = void*;
using hipFunction = void*;
constexpr hipError kHipSuccess = 0;
constexpr hipError kHipErrorDeinitialized = 4;  // at the process's end
constexpr hipError kHipErrorNoDevice = 100;
constexpr int kHipMemcpyDefault = 4;

#define LLMC_HIP_FUNCTIONS(F)                                                                    \
  F(hipGetDeviceCount, (int*))                                                                   \
  F(hipSetDevice, (int))                                                                         \
  F(hipDeviceGetName, (char*, int, int))                                                         \
  F(hipDriverGetVersion, (int*))                                                                 \
  F(hipMemGetInfo, (size_t*, size_t*))                                                           \
  F(hipMalloc, (void**, size_t))                                                                 \
  F(hipFree, (void*))                                                                            \
  F(hipMemcpyAsync, (void*, const void*, size_t, int, hipStream))                                \
  F(hipStreamSynchronize, (hipStream))                                                           \
  F(hipModuleLoadData, (hipModule*, const void*))                                                \
  F(hipModuleGetFunction, (hipFunction*, hipModule, const char*))                                \
  F(hipModuleLaunchKernel,                                                                       \
    (hipFunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, hipStream, \
     void**, void**))

#define LLMC_DECLARE(name, parameters) extern hipError(*name) parameters;
LLMC_HIP_FUNCTIONS(LLMC_DECLARE)
#undef LLMC_DECLARE
extern const char* (*hipGetErrorName)(hipError);

// What is wrong with HIP on this machine, or ""; loads it the first time.
const std::string& Problem();

// The architecture of a device, such as gfx942, without features such as :xnack-.
std::string Architecture(int device);

// Throws RuntimeError "HIP: <the error's name>: <what>", unless the call succeeded.
void Check(hipError result, const std::string& what);

}  // namespace llmc::rocm
