// A GPU's block on the host, for tests: every thread is a fiber, and what a warp does together happens when its last
// lane arrives. Layouts of fragments are those that PTX documents for ldmatrix and mma.sync. Copies arrive when they
// are waited for, and no sooner; shared memory begins as NaN, ends at a page that can't be touched, and warps run far
// apart in time.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace natten2::cuda {

struct Emulation {
  static constexpr int kWarp = 32;
  static constexpr size_t kStack = size_t{1} << 17;

  struct Copy {
    unsigned char* shared;
    const unsigned char* global;
    int bytes;
    bool is_there;
  };

  struct Message {
    const char* what;
    unsigned char data[64];
  };

  struct Fiber {
    ucontext_t context;
    std::unique_ptr<unsigned char[]> stack;
    bool is_done = true;
    uint64_t meetings = 0;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
  };

  struct Meeting {
    int arrived = 0;
    uint64_t count = 0;
    bool condition[2] = {false, false};
  };

  int threads = 0;
  uint32_t block = 0;
  int row = 0;
  int current = 0;
  bool is_reversed = false;
  bool has_moved = false;
  std::string error;
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  std::vector<Message> messages;  // [2][threads]
  Meeting all;
  std::function<void()> body;
  unsigned char* pages = nullptr;
  size_t mapped = 0;
  unsigned char* memory = nullptr;
  size_t bytes = 0;

  static Emulation& get() {
    static Emulation emulation;
    return emulation;
  }

  // One block; throws what its threads did wrong.
  void run(uint32_t index, int block_row, int count, size_t shared_bytes, std::function<void()> kernel) {
    block = index;
    row = block_row;
    threads = count;
    body = std::move(kernel);
    error.clear();
    map(shared_bytes);
    fibers.resize(threads);
    warps.assign(threads / kWarp, {});
    messages.assign(2 * threads, {});
    all = {};
    for (Fiber& fiber : fibers) {
      if (!fiber.stack) fiber.stack.reset(new unsigned char[kStack]);
      fiber.is_done = false;
      fiber.meetings = 0;
      fiber.groups.clear();
      fiber.open.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, &Emulation::start, 0);
    }
    schedule();
    if (!error.empty()) throw std::runtime_error(error);
  }

  static void start() {
    Emulation& self = get();
    self.body();
    self.fibers[self.current].is_done = true;
    self.has_moved = true;
  }

  // A warp runs for as long as it can before another one does.
  void schedule() {
    const int warp_count = threads / kWarp;
    for (bool is_running = true; is_running && error.empty();) {
      is_running = false;
      bool has_block_moved = false;
      for (int w = 0; w < warp_count; ++w) {
        const int warp = is_reversed ? warp_count - 1 - w : w;
        do {
          has_moved = false;
          for (int i = 0; i < kWarp && error.empty(); ++i) {
            const int thread = warp * kWarp + (is_reversed ? kWarp - 1 - i : i);
            if (fibers[thread].is_done) continue;
            is_running = true;
            current = thread;
            swapcontext(&scheduler, &fibers[thread].context);
          }
          has_block_moved |= has_moved;
        } while (has_moved && error.empty());
      }
      if (is_running && !has_block_moved && error.empty()) error = "a block's threads wait for each other";
    }
  }

  void yield() { swapcontext(&fibers[current].context, &scheduler); }

  // Never comes back.
  [[noreturn]] void fail(const std::string& reason) {
    if (error.empty()) error = reason;
    for (;;) yield();
  }

  void wait(Meeting& meeting, int expected) {
    const uint64_t mine = meeting.count;
    has_moved = true;
    if (++meeting.arrived == expected) {
      meeting.arrived = 0;
      meeting.condition[(meeting.count + 1) % 2] = false;
      ++meeting.count;
      return;
    }
    while (meeting.count == mine) yield();
  }

  // Leaves a message to the warp, and returns those of all lanes once every lane has come to do the same.
  template <class T>
  const Message* exchange(const char* what, const T& data) {
    static_assert(sizeof(T) <= sizeof(Message::data));
    const int warp = current / kWarp;
    // A lane can be one meeting ahead of those who still read.
    Message* slots = messages.data() + (fibers[current].meetings++ % 2) * threads + warp * kWarp;
    Message& mine = slots[current % kWarp];
    mine.what = what;
    std::memcpy(mine.data, &data, sizeof(T));
    wait(warps[warp], kWarp);
    for (int lane = 0; lane < kWarp; ++lane)
      if (std::strcmp(slots[lane].what, what) != 0)
        fail(std::string("lanes part: ") + what + " and " + slots[lane].what);
    return slots;
  }

  template <class T>
  static T read(const Message& message) {
    T data;
    std::memcpy(&data, message.data, sizeof(T));
    return data;
  }

  bool meet_block(bool condition) {
    all.condition[all.count % 2] |= condition;
    const uint64_t mine = all.count;
    wait(all, threads);
    return all.condition[mine % 2];
  }

  void map(size_t shared_bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    bytes = shared_bytes;
    const size_t size = (shared_bytes + page - 1) / page * page;
    if (size + 2 * page != mapped) {
      if (pages) munmap(pages, mapped);
      mapped = size + 2 * page;
      pages = static_cast<unsigned char*>(mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      mprotect(pages + page, size, PROT_READ | PROT_WRITE);
    }
    memory = pages + page + size - shared_bytes;
    std::memset(memory, 0xff, shared_bytes);
  }

  void check_shared(const void* pointer, size_t count, size_t alignment) {
    const auto* address = static_cast<const unsigned char*>(pointer);
    if (address < memory || address + count > memory + bytes) fail("an address is outside of shared memory");
    if (reinterpret_cast<uintptr_t>(address) % alignment) fail("an address in shared memory is not aligned");
  }

  void copy(void* shared, const void* global, int count, bool is_there) {
    check_shared(shared, count, count);
    if (reinterpret_cast<uintptr_t>(global) % count) fail("an address in global memory is not aligned");
    std::memset(shared, 0xff, count);
    fibers[current].open.push_back(
        {static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), count, is_there});
  }

  void commit() {
    fibers[current].groups.push_back(std::move(fibers[current].open));
    fibers[current].open.clear();
  }

  void wait_copies(size_t pending) {
    auto& groups = fibers[current].groups;
    while (groups.size() > pending) {
      for (const Copy& one : groups.front()) {
        if (one.is_there)
          std::memcpy(one.shared, one.global, one.bytes);
        else
          std::memset(one.shared, 0, one.bytes);
      }
      groups.erase(groups.begin());
    }
  }
};

inline uint32_t thread_index() { return static_cast<uint32_t>(Emulation::get().current); }
inline uint32_t block_index() { return Emulation::get().block; }
inline int block_row() { return Emulation::get().row; }
inline unsigned char* shared_memory() { return Emulation::get().memory; }

inline void sync_block() { Emulation::get().meet_block(false); }
inline bool any_of_block(bool condition) { return Emulation::get().meet_block(condition); }
inline void sync_warp() { Emulation::get().exchange("sync_warp", 0); }

inline bool any_of_warp(bool condition) {
  const auto* all = Emulation::get().exchange("any_of_warp", condition);
  for (int lane = 0; lane < 32; ++lane)
    if (Emulation::read<bool>(all[lane])) return true;
  return false;
}

inline int smallest_of_warp(int number) {
  const auto* all = Emulation::get().exchange("smallest_of_warp", number);
  for (int lane = 0; lane < 32; ++lane) number = std::min(number, Emulation::read<int>(all[lane]));
  return number;
}

inline int largest_of_warp(int number) {
  const auto* all = Emulation::get().exchange("largest_of_warp", number);
  for (int lane = 0; lane < 32; ++lane) number = std::max(number, Emulation::read<int>(all[lane]));
  return number;
}

inline void add_apart(float* sum, float number, bool adds) {
  Emulation& self = Emulation::get();
  float* mine = adds ? sum : nullptr;
  if (adds) self.check_shared(sum, sizeof(float), sizeof(float));
  const auto* all = self.exchange("add_apart", mine);
  for (int lane = 0; lane < 32; ++lane)
    if (adds && lane != self.current % 32 && Emulation::read<float*>(all[lane]) == mine)
      self.fail("two lanes add to the same number");
  if (adds) *sum += number;
  self.exchange("add_apart", 0);
}

template <class T>
T shuffle(T number, int lane) {
  return Emulation::read<T>(Emulation::get().exchange("shuffle", number)[lane % 32]);
}

inline float shuffle_xor(float number, int mask) {
  Emulation& self = Emulation::get();
  return Emulation::read<float>(self.exchange("shuffle_xor", number)[(self.current % 32) ^ mask]);
}

inline void copy_16(void* shared, const void* global, bool is_there) {
  Emulation::get().copy(shared, global, 16, is_there);
}
inline void copy_4(void* shared, const void* global) { Emulation::get().copy(shared, global, 4, true); }
inline void commit_copies() { Emulation::get().commit(); }

template <int kPending>
void wait_for_copies() {
  Emulation::get().wait_copies(kPending);
}

inline uint16_t element_of_matrix(const Emulation::Message* rows, int matrix, int row, int column) {
  const auto* address = Emulation::read<const uint16_t*>(rows[8 * matrix + row]);
  return address[column];
}

inline void load_matrices(uint32_t (&out)[4], const void* row) {
  Emulation& self = Emulation::get();
  self.check_shared(row, 16, 16);
  const auto* rows = self.exchange("load_matrices", row);
  const int lane = self.current % 32;
  for (int i = 0; i < 4; ++i)
    out[i] = element_of_matrix(rows, i, lane / 4, 2 * (lane % 4)) |
             uint32_t{element_of_matrix(rows, i, lane / 4, 2 * (lane % 4) + 1)} << 16;
  // Others still read what this lane might write next.
  self.exchange("load_matrices", 0);
}

inline void load_transposed_matrices(uint32_t (&out)[4], const void* row) {
  Emulation& self = Emulation::get();
  self.check_shared(row, 16, 16);
  const auto* rows = self.exchange("load_transposed_matrices", row);
  const int lane = self.current % 32;
  for (int i = 0; i < 4; ++i)
    out[i] = element_of_matrix(rows, i, 2 * (lane % 4), lane / 4) |
             uint32_t{element_of_matrix(rows, i, 2 * (lane % 4) + 1, lane / 4)} << 16;
  self.exchange("load_transposed_matrices", 0);
}

inline uint32_t to_bits(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return bits;
}

inline float from_bits(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

inline float widen_half(uint16_t bits) {
  _Float16 number;
  std::memcpy(&number, &bits, sizeof(number));
  return static_cast<float>(number);
}

inline uint16_t narrow_half(float number) {
  const _Float16 narrow = static_cast<_Float16>(number);
  uint16_t bits;
  std::memcpy(&bits, &narrow, sizeof(bits));
  return bits;
}

inline uint16_t narrow_bfloat16(float number) {
  const uint32_t bits = to_bits(number);
  if (std::isnan(number)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint32_t pack_half(float first, float second) {
  return narrow_half(first) | uint32_t{narrow_half(second)} << 16;
}
inline uint32_t pack_bfloat16(float first, float second) {
  return narrow_bfloat16(first) | uint32_t{narrow_bfloat16(second)} << 16;
}

inline uint32_t round_to_tf32(float number) {
  const uint32_t bits = to_bits(number);
  return std::isfinite(number) ? (bits + 0x1000) & ~0x1fffu : bits;
}

struct Fragments {
  uint32_t left[4];
  uint32_t right[2];
};

// Rows of the left operand are lane / 4 and lane / 4 + 8, and so are those of the sum; columns of the right one lane
// / 4.
template <class Widen>
void multiply_16(const char* what, float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1,
                 Widen widen) {
  Emulation& self = Emulation::get();
  const auto* all = self.exchange(what, Fragments{{left[0], left[1], left[2], left[3]}, {right0, right1}});
  const int lane = self.current % 32;
  const auto half_word = [](uint32_t word, int k) { return static_cast<uint16_t>(word >> 16 * (k % 2)); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    double total = 0;
    for (int k = 0; k < 16; ++k) {
      const Fragments of_row = Emulation::read<Fragments>(all[row % 8 * 4 + k % 8 / 2]);
      const Fragments of_column = Emulation::read<Fragments>(all[column * 4 + k % 8 / 2]);
      total += static_cast<double>(widen(half_word(of_row.left[row / 8 + 2 * (k / 8)], k))) *
               widen(half_word(of_column.right[k / 8], k));
    }
    sum[i] = static_cast<float>(sum[i] + total);
  }
}

inline void multiply_half(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  multiply_16("multiply_half", sum, left, right0, right1, widen_half);
}

inline void multiply_bfloat16(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  multiply_16("multiply_bfloat16", sum, left, right0, right1,
              [](uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); });
}

// The unit reads no more than tf32's bits of an operand.
inline void multiply_tf32(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  Emulation& self = Emulation::get();
  const auto* all = self.exchange("multiply_tf32", Fragments{{left[0], left[1], left[2], left[3]}, {right0, right1}});
  const int lane = self.current % 32;
  const auto number = [](uint32_t bits) { return from_bits(bits & ~0x1fffu); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    double total = 0;
    for (int k = 0; k < 8; ++k) {
      const Fragments of_row = Emulation::read<Fragments>(all[row % 8 * 4 + k % 4]);
      const Fragments of_column = Emulation::read<Fragments>(all[column * 4 + k % 4]);
      total += static_cast<double>(number(of_row.left[row / 8 + 2 * (k / 4)])) * number(of_column.right[k / 4]);
    }
    sum[i] = static_cast<float>(sum[i] + total);
  }
}

inline float power_of_two(float exponent) { return std::exp2(exponent); }
inline float logarithm(float number) { return std::log2(number); }

}  // namespace natten2::cuda
