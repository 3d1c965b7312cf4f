// The vector type of the kernels: F, floats; I, as many 32-bit integers; M, a mask. Arithmetic, shifts and casts
// between F and I are the compiler's vector extensions (GCC and Clang); only what those can't say is spelled out here.
//
// This header is compiled once per instruction set, inside that set's namespace. It uses no function of the standard
// library that could leave a weak symbol behind (see types.h).
#pragma once
#include <cstddef>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace talksplat::TALKSPLAT_ISA {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using F = __m512;
typedef int32_t I __attribute__((vector_size(64)));
using M = __mmask16;

INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }  // b where either is NaN, as for max
INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
INLINE F sqrt(F a) { return _mm512_sqrt_ps(a); }
INLINE F rough_sqrt(F a) { return a * _mm512_rsqrt14_ps(max(a, _mm512_set1_ps(1e-30f))); }  // to 1e-3 or better
INLINE F reciprocal(F a) {  // 14 bits and one Newton step
  const F r = _mm512_rcp14_ps(a);
  return r * (2.f - a * r);
}
INLINE F minus_product(F x, F a, F b) { return _mm512_fnmadd_ps(a, b, x); }  // x - a b
INLINE M ge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
INLINE M gt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
INLINE M both(M a, M b) { return _kand_mask16(a, b); }
INLINE int bits(M m) { return m; }
INLINE F keep(M m, F a) { return _mm512_maskz_mov_ps(m, a); }  // zero elsewhere
INLINE void compress(float* to, M m, F a) {  // the chosen lanes in a row; writes up to kLanes
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(m, a));
}
INLINE F from_int8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using F = __m256;
typedef int32_t I __attribute__((vector_size(32)));
using M = __m256;

INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
INLINE F sqrt(F a) { return _mm256_sqrt_ps(a); }
INLINE F rough_sqrt(F a) { return a * _mm256_rsqrt_ps(max(a, _mm256_set1_ps(1e-30f))); }  // to 1e-3 or better
INLINE F reciprocal(F a) { return 1.f / a; }
INLINE F minus_product(F x, F a, F b) { return _mm256_fnmadd_ps(a, b, x); }  // x - a b
INLINE M ge(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
INLINE M gt(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
INLINE M both(M a, M b) { return _mm256_and_ps(a, b); }
INLINE int bits(M m) { return _mm256_movemask_ps(m); }
INLINE F keep(M m, F a) { return _mm256_and_ps(m, a); }
// For each of the 256 masks, the lanes that are set, lowest first.
struct CompressTable {
  alignas(8) uint8_t lanes[256][8] = {};
  constexpr CompressTable() {
    for (int m = 0; m < 256; m++)
      for (int lane = 0, n = 0; lane < 8; lane++)
        if (m >> lane & 1) lanes[m][n++] = uint8_t(lane);
  }
};
static constexpr CompressTable kCompress;
INLINE void compress(float* to, M m, F a) {
  const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress.lanes[_mm256_movemask_ps(m)]));
  _mm256_storeu_ps(to, _mm256_permutevar8x32_ps(a, _mm256_cvtepu8_epi32(lanes)));
}
INLINE F from_int8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

#else

constexpr int kLanes = 4;  // SSE2, NEON, or what the compiler makes of it
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
using M = I;

INLINE F min(F a, F b) { return a < b ? a : b; }
INLINE F max(F a, F b) { return a > b ? a : b; }
INLINE F sqrt(F a) {
  return F{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
}
INLINE F rough_sqrt(F a) { return sqrt(a); }
INLINE F reciprocal(F a) { return 1.f / a; }
INLINE F minus_product(F x, F a, F b) { return x - a * b; }
INLINE M ge(F a, F b) { return a >= b; }
INLINE M gt(F a, F b) { return a > b; }
INLINE M both(M a, M b) { return a & b; }
INLINE int bits(M m) {
#if defined(__SSE2__)
  return _mm_movemask_ps((__m128)m);
#else
  return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8);
#endif
}
INLINE F keep(M m, F a) { return (F)(m & (I)a); }
INLINE void compress(float* to, M m, F a) {
  UNROLL for (int lane = 0; lane < kLanes; lane++) {
    *to = a[lane];
    to -= m[lane];
  }
}
INLINE F from_int8(const int8_t* p) { return F{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }

#endif

INLINE F set(float x) { return x - F{}; }
INLINE F load(const float* p) {
  F x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
INLINE void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
INLINE int count(M m) {
#if defined(__POPCNT__)
  return __builtin_popcount(unsigned(bits(m)));
#else
  const int b = bits(m);  // four lanes; without the instruction, popcount is a call
  return (b & 1) + (b >> 1 & 1) + (b >> 2 & 1) + (b >> 3);
#endif
}
INLINE bool any(M m) { return bits(m) != 0; }
INLINE F clamp(F x, F low, F high) { return min(max(x, low), high); }
INLINE F to_float(I x) { return __builtin_convertvector(x, F); }

typedef double D __attribute__((vector_size(kLanes * 8)));  // two registers
INLINE D to_double(F x) { return __builtin_convertvector(x, D); }

// 0, 1, 2, ...
INLINE I iota() {
  I x{};
  UNROLL for (int lane = 0; lane < kLanes; lane++) x[lane] = lane;
  return x;
}

INLINE float sum(F x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#elif defined(__AVX2__)
  const __m128 half = _mm256_castps256_ps128(x) + _mm256_extractf128_ps(x, 1);
  const __m128 quarter = half + _mm_movehl_ps(half, half);
  return quarter[0] + quarter[1];
#else
  return (x[0] + x[1]) + (x[2] + x[3]);
#endif
}

// Polynomials for 2^f, highest power first, with the least relative error: 2.6e-6 and 7.5e-5.
#if defined(__AVX512F__)  // 0 <= f < 1
constexpr float kExp2[] = {1.35341680e-02f, 5.20114614e-02f, 2.41442756e-01f, 6.93003835e-01f, 1.00000259e+00f};
constexpr float kExp2Coarse[] = {7.80245236e-02f, 2.26067161e-01f, 6.95833534e-01f, 9.99925220e-01f};
#else  // -1/2 <= f <= 1/2
constexpr float kExp2[] = {9.57010199e-03f, 5.59178610e-02f, 2.40247448e-01f, 6.93121815e-01f, 9.99999261e-01f};
constexpr float kExp2Coarse[] = {5.51716697e-02f, 2.42611127e-01f, 6.93260986e-01f, 9.99928073e-01f};
#endif

// 2^x for -126 <= x <= 127; elsewhere garbage, but in AVX-512.
template <int Terms>
INLINE F exp2(F x, const float (&polynomial)[Terms]) {
#if defined(__AVX512F__)
  const F f = _mm512_reduce_ps(x, 9);  // x - floor(x)
#else
  // Adding 1.5 * 2^23 rounds x to an integer, which is then the low bits of the sum.
  const F magic = set(0x1.8p23f), shifted = x + magic, f = x - (shifted - magic);
#endif
  F p = set(polynomial[0]);
  UNROLL for (int i = 1; i < Terms; i++) p = p * f + polynomial[i];
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, x);
#else
  return (F)((I)p + ((I)shifted << 23));
#endif
}

// e^x, relative error 2e-7; 0 below the range of floats and infinite or huge above it; NaN stays NaN.
INLINE F exp(F x) {
  const F magic = set(0x1.8p23f), y = clamp(x, set(-87.f), set(88.f));
  const F shifted = y * 1.4426950409f + magic, n = shifted - magic;
  const F f = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  F p = f * 1.3888889e-3f + 8.3333333e-3f;
  p = p * f + 4.1666667e-2f;
  p = p * f + 1.6666667e-1f;
  p = p * f + .5f;
  p = p * f + 1.f;
  p = p * f + 1.f;
  const F y_exp = (F)((I)p + ((I)shifted << 23));
  return y_exp + (x - x);  // NaN and infinities come out as NaN
}

// log2 of a normal number; garbage elsewhere.
INLINE F log2(F x) {
  const I u = (I)x;
  const I exponent = (u - 0x3f3504f3) >> 23;  // the mantissa then lies in [sqrt(1/2), sqrt(2))
  const F m = (F)(u - (exponent << 23));
  const F y = (m - 1.f) / (m + 1.f), y2 = y * y;  // log(m) = 2 atanh(y)
  F p = y2 * .32f + .41219859f;
  p = p * y2 + .577078016f;
  p = p * y2 + .961796694f;
  return to_float(exponent) + y * (p * y2 + 2.885390082f);
}

}  // namespace talksplat::TALKSPLAT_ISA
