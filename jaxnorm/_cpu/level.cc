// Which of the libraries the processor at hand runs: the level of x86-64, or 0 elsewhere.

#pragma GCC visibility push(default)
extern "C" int jaxnorm_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return 4;
  if (__builtin_cpu_supports("x86-64-v3")) return 3;
  if (__builtin_cpu_supports("x86-64-v2")) return 2;
#endif
  return 0;
}
#pragma GCC visibility pop
