// Scratch memory, handed out piece by piece.
#pragma once

#include "../window.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>

#include <cstring>
#endif

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

#ifdef __SANITIZE_ADDRESS__
// What is behind a piece is reported when it is touched; what is in it is no number until it is written.
constexpr int64_t kGuardBytes = 1024;

inline void guard(char* piece, int64_t bytes, int64_t room) {
  __asan_unpoison_memory_region(piece, bytes);
  std::memset(piece, 0xff, bytes);
  __asan_poison_memory_region(piece + bytes, room - bytes);
}
#else
constexpr int64_t kGuardBytes = 0;

inline void guard(char*, int64_t, int64_t) {}
#endif

// Without memory, it counts what would be needed.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = count * sizeof(T), room = round_up(bytes + kGuardBytes, 64);
    char* piece = memory_ ? memory_ + used_ : nullptr;
    if (piece) guard(piece, bytes, room);
    used_ += room;
    return reinterpret_cast<T*>(piece);
  }

  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu
