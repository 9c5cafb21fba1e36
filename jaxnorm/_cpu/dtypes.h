// Numbers of half precision, widened and rounded by arithmetic on their bits, which any
// compiler vectorizes, and which knows subnormal numbers where the processor flushes them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace jaxnorm {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float v) {
  uint32_t u;
  std::memcpy(&u, &v, sizeof u);
  return u;
}
inline float of_bits(uint32_t u) {
  float v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}

// What sums over numbers of type T are taken in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline float load(float v) { return v; }
inline double load(double v) { return v; }
inline float load(BFloat16 v) { return of_bits(uint32_t(v.bits) << 16); }
inline float load(Float16 v) {
  const uint32_t exponent = 0x7c00u << 13, size = (v.bits & 0x7fffu) << 13;
  const uint32_t normal = size + (112u << 23);
  const uint32_t special = normal + (112u << 23);  // inf and NaN
  // Subnormal: as the mantissa of a number that is not, which is then subtracted.
  const uint32_t small = bits_of(of_bits(normal + (1u << 23)) - of_bits(113u << 23));
  uint32_t found = (size & exponent) == exponent ? special : normal;
  found = (size & exponent) == 0 ? small : found;
  return of_bits(found | uint32_t(v.bits & 0x8000u) << 16);
}

inline void store(float v, float& to) { to = v; }
inline void store(double v, double& to) { to = v; }
inline void store(float v, BFloat16& to) {
  const uint32_t u = bits_of(v);
  const uint32_t even = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40u;
  to.bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? nan : even);
}
inline void store(float v, Float16& to) {
  const uint32_t magic = 126u << 23;  // which shifts a subnormal's mantissa into place
  const uint32_t whole = bits_of(v), sign = whole & 0x80000000u, u = whole ^ sign;
  const uint32_t special = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t small = bits_of(of_bits(u) + of_bits(magic)) - magic;
  const uint32_t normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  uint32_t found = u < (113u << 23) ? small : normal;
  found = u >= (143u << 23) ? special : found;
  to.bits = uint16_t(found | sign >> 16);
}

// n numbers in the type that sums are taken in: as they lie, or copied to `scratch`.
inline const float* widened(const float* x, int64_t, float*) { return x; }
inline const double* widened(const double* x, int64_t, double*) { return x; }
template <class T>
const float* widened(const T* __restrict x, int64_t n, float* __restrict scratch) {
  for (int64_t i = 0; i < n; ++i) scratch[i] = load(x[i]);
  return scratch;
}

}  // namespace jaxnorm
