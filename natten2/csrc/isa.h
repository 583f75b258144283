// Where code is compiled for: the instruction set names a namespace, so that one set of sources compiled several times
// never shares a symbol.
#pragma once

#ifndef NATTEN2_ISA
#define NATTEN2_ISA baseline
#endif

#ifdef __CUDACC__
#define NATTEN2_HOST_DEVICE __host__ __device__
#else
#define NATTEN2_HOST_DEVICE
#endif
