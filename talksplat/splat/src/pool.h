// A private pool of threads that share the frames of a batch.
#pragma once
#include <functional>

namespace talksplat {

int usable_cores();

// Calls task(0) ... task(count - 1), at most `threads` at a time, the caller's thread among them; returns when all are
// done and throws the first exception that one of them threw. Calls from several threads share the same workers.
void parallel_for(int count, int threads, const std::function<void(int)>& task);

}  // namespace talksplat
