// Worker threads that look for work for a moment after a call, then sleep. One pool a process; a
// forked child starts its own.
#pragma once

#include <functional>

namespace fastshift::cpu {

// Call task(0) ... task(count - 1), each once, on up to `threads` threads, this one among them.
void parallel(int count, int threads, const std::function<void(int)>& task);

}  // namespace fastshift::cpu
