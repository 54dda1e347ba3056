// Work in equal shares, one for each thread.
#pragma once
#include "fewbit.h"

namespace fewbit {

// Calls task(context, share) once for each share, on up to as many threads, and waits for all.
void in_shares(int shares, void (*task)(void* context, int share), void* context);
void use_openmp(fewbit_parallel parallel);

}  // namespace fewbit
