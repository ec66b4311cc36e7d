// Reads modules of kernels as llmc/targets/gpu/module_bytes.py writes them.
#pragma once

#include <tvm/ffi/error.h>
#include <tvm/ffi/string.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace llmc {

inline uint32_t Crc32(const std::string& data) {
  uint32_t crc = ~0u;
  for (unsigned char byte : data) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
  }
  return ~crc;
}

// Throws ValueError, which begins with `api`, where the bytes end too early. The bytes have to
// outlive the reader.
class Reader {
 public:
  Reader(const char* api, const tvm::ffi::Bytes& bytes)
      : api_(api), at_(bytes.data()), end_(at_ + bytes.size()) {}

  std::string Bytes(size_t count) {
    if (static_cast<size_t>(end_ - at_) < count) {
      TVM_FFI_THROW(ValueError) << api_ << ": the kernels' module is cut short";
    }
    at_ += count;
    return std::string(at_ - count, count);
  }
  uint32_t Number() {
    std::string bytes = Bytes(4);
    uint32_t value;
    std::memcpy(&value, bytes.data(), 4);
    return value;
  }
  std::string String() { return Bytes(Number()); }
  std::vector<std::string> Strings() {
    std::vector<std::string> texts;
    for (uint32_t count = Number(); count > 0; --count) texts.push_back(String());
    return texts;
  }
  void ExpectMagic(const std::string& magic) {
    if (Bytes(magic.size()) != magic) {
      TVM_FFI_THROW(ValueError) << api_ << ": not a module of kernels of this version";
    }
  }

 private:
  const char* api_;
  const char* at_;
  const char* end_;
};

}  // namespace llmc
