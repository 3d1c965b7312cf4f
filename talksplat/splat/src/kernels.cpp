// Compiled once per instruction set, with TALKSPLAT_ISA naming it. Everything lives in that set's namespace, so that
// no two objects define the same symbol.
#include "simd.h"
#include "types.h"

namespace talksplat::TALKSPLAT_ISA {
namespace {

// Denormals cost ~150 cycles each on x86 and carry nothing visible here.
struct [[maybe_unused]] FlushDenormals {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(saved | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved); }
#endif
};

#include "project.inl"
#include "draw.inl"
#include "backward.inl"
#include "blendshapes.inl"
#include "ssim.inl"

#define TEXT(x) TEXT_(x)
#define TEXT_(x) #x

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {TEXT(TALKSPLAT_ISA), prepare, draw, backward, draw_dirty, draw_onto, blend, ssim};

}  // namespace talksplat::TALKSPLAT_ISA
