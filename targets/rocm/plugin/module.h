// Modules of code objects, as the build writes them (code_objects.py states the format).
#pragma once

#include <tvm/ffi/extra/module.h>

namespace llmc::rocm {

// Throws ValueError where the bytes are damaged. Needs no device.
tvm::ffi::Module LoadModule(const tvm::ffi::Bytes& bytes);

}  // namespace llmc::rocm
