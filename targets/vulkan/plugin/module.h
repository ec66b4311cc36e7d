// Modules of SPIR-V kernels, as the code generator writes them (build.py states the format).
#pragma once

#include <tvm/ffi/extra/module.h>

namespace llmc::vulkan {

// Throws ValueError where the bytes are damaged.
tvm::ffi::Module LoadModule(const tvm::ffi::Bytes& bytes);

// The device that this thread's kernels run on.
int CurrentDevice();

}  // namespace llmc::vulkan
