#include "types.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace talksplat {

Buffer::~Buffer() { std::free(memory_); }

void* Buffer::reserve(size_t bytes) {
  if (bytes > bytes_ || !memory_) {
    const size_t rounded = (bytes + bytes / 2 + 127) / 64 * 64;  // room to grow, and never zero
    std::free(memory_);
    bytes_ = 0;
    memory_ = std::aligned_alloc(64, rounded);
    if (!memory_) throw std::bad_alloc();
    bytes_ = rounded;
  }
  return memory_;
}

#define DECLARE_KERNELS(isa) \
  namespace isa {            \
  extern const Kernels kernels; \
  }
#ifdef TALKSPLAT_HAS_avx512
DECLARE_KERNELS(avx512)
#endif
#ifdef TALKSPLAT_HAS_avx2
DECLARE_KERNELS(avx2)
#endif
DECLARE_KERNELS(portable)

namespace {

struct Table {
  const Kernels* kernels[3] = {};
  const char* names[4] = {};

  Table() {
    int n = 0;
#ifdef TALKSPLAT_HAS_avx512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
      kernels[n++] = &avx512::kernels;
#endif
#ifdef TALKSPLAT_HAS_avx2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
      kernels[n++] = &avx2::kernels;
#endif
    kernels[n++] = &portable::kernels;
    for (int i = 0; i < n; i++) names[i] = kernels[i]->name;
  }
};

const Table& table() {
  static const Table t;
  return t;
}

}  // namespace

const char* const* available_isas() { return table().names; }

const Kernels* find_kernels(const char* isa) {
  for (const Kernels* k : table().kernels)
    if (k && !std::strcmp(k->name, isa)) return k;
  return nullptr;
}

}  // namespace talksplat
