/* gcc 12's _tile_loadconfig tells the compiler that 8 of the 64 bytes are read, so llama.cpp's AMX kernels load a table
   that is not yet written and crash. Included before every file of its build (install.py). */
#pragma once
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)))
#endif
