// Which tokens a block owns, and in which boxes of shared memory it visits their partners.
//
// A block of four warps owns a box of 64 tokens of one dilation group, each warp a smaller box of 16: queries, whose
// partners are keys, or keys, whose partners are the queries that see them (natten2/csrc/window.h has both). The
// partners of a box are a box too. The block loads the partners of all its tokens, in chunks where they are many, and
// each warp numbers those of its own tokens through, whatever their shape: matrix instructions gather rows from
// anywhere.
#pragma once

#include "numbers.cuh"
#include "problem.h"

namespace natten2::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;
constexpr int kOwned = kWarps * kRows;

// Positions inside a chunk are packed into one word, ten bits for each axis, whose highest one guards against the next.
constexpr int kField = 10;
constexpr int kMostChunkSide = (1 << (kField - 1)) - 1;
constexpr uint32_t kEachField = 1u | 1u << kField | 1u << 2 * kField;
constexpr uint32_t kGuards = kEachField << (kField - 1);
constexpr uint32_t kNowhere = kEachField * kMostChunkSide;
// What divisions by multiplication are exact for.
constexpr int kMostChunkRows = 1 << kField;

// How a kernel's blocks divide the work; plan.h makes it.
struct Plan {
  int32_t warp_tile[kAxes];  // log2 of the sides of a warp's box of owned tokens
  int32_t warps[kAxes];      // log2 of how many of them make up the block's
  int32_t chunk[kAxes];      // sides of the boxes of partners
  int32_t chunk_rows;        // what fits in a chunk, in multiples of 16
  int32_t stages;            // chunks in memory: 2 where the next one is loaded while one is visited
  uint32_t tiles[kAxes];     // of a dilation group
  uint32_t items;            // tiles of a head, over the batch
  uint32_t parts;            // blocks that share them
  int32_t step_parts;        // blocks that share the chunks of a tile
  bool sees_all;             // additional keys own their tile, and every query is a partner
  int32_t offsets;           // entries of a head's bias, 0 without one
  int32_t grad_tables;       // of a warp's sums by offset: 4, 1, or 0
};

struct Box {
  int begin[kAxes];
  int size[kAxes];

  NATTEN2_DEVICE int count() const { return size[0] * size[1] * size[2]; }
};

// Numbers a box's tokens through, in row-major order; a division by multiplication is exact for so few.
class Numbering {
 public:
  NATTEN2_DEVICE explicit Numbering(const int (&size)[kAxes])
      : height_(size[1]), width_(size[2]), by_height_(inverse(size[1])), by_width_(inverse(size[2])) {}

  NATTEN2_DEVICE void find(int number, int (&at)[kAxes]) const {
    const int row = static_cast<int>(static_cast<uint32_t>(number) * by_width_ >> 2 * kField);
    at[0] = static_cast<int>(static_cast<uint32_t>(row) * by_height_ >> 2 * kField);
    at[1] = row - at[0] * height_;
    at[2] = number - row * width_;
  }

 private:
  NATTEN2_DEVICE static uint32_t inverse(int size) { return ((1u << 2 * kField) + size - 1) / size; }

  int height_, width_;
  uint32_t by_height_, by_width_;
};

// A block's tile.
struct Tile {
  int batch;
  int group[kAxes];
  int first[kAxes];   // position of the first token
  int length[kAxes];  // positions in the group
  int gap[kAxes];     // tokens from one position to the next, of partners too
  bool is_empty;
};

// A token that a block owns, and the partners that it sees along each axis.
struct Token {
  int position[kAxes];
  int begin[kAxes];
  int end[kAxes];
  bool exists;
};

// What the block's threads know of its tile, in shared memory, for registers are few.
struct Owned {
  Tile tile;
  Box partners;                  // of all tokens
  int chunks[kAxes];             // that these come in, along each axis
  Box partners_of_warp[kWarps];  // of a warp's; empty where it has none
  Token tokens[kOwned];
};

NATTEN2_HOST_DEVICE inline int block_side(const Plan& plan, int axis) {
  return 1 << (plan.warp_tile[axis] + plan.warps[axis]);
}

NATTEN2_DEVICE void find_tile(const Problem& problem, const Plan& plan, uint32_t item, Tile& tile) {
  tile.is_empty = false;
  NATTEN2_UNROLL
  for (int axis = kAxes - 1; axis >= 0; --axis) {
    const uint32_t gap = plan.sees_all ? 1 : problem.axes[axis].dilation;
    const uint32_t along = item % (gap * plan.tiles[axis]);
    item /= gap * plan.tiles[axis];
    const uint32_t number = quotient<uint32_t>(along, gap);
    tile.gap[axis] = static_cast<int>(gap);
    tile.group[axis] = static_cast<int>(along - number * gap);
    tile.first[axis] = static_cast<int>(number) * block_side(plan, axis);
    tile.length[axis] = group_length(problem.axes[axis], tile.group[axis]);
    if (plan.sees_all) tile.length[axis] = axis == kAxes - 1 ? problem.additional : 1;
    tile.is_empty |= tile.first[axis] >= tile.length[axis];
  }
  tile.batch = static_cast<int>(item);
}

template <bool kOwnsKeys>
NATTEN2_DEVICE BasicInterval<int> partner_bounds(const Problem& problem, const Plan& plan, const Tile& tile, int axis,
                                                 int position) {
  if constexpr (kOwnsKeys) {
    if (plan.sees_all) return {0, problem.axes[axis].length};
    return query_bounds(problem.axes[axis], tile.length[axis], position);
  } else {
    return key_bounds(problem.axes[axis], tile.length[axis], position);
  }
}

// The partners of all tokens of a tile.
template <bool kOwnsKeys>
NATTEN2_DEVICE void find_partners(const Problem& problem, const Plan& plan, const Tile& tile, Box& box) {
  NATTEN2_UNROLL
  for (int axis = 0; axis < kAxes; ++axis) {
    const int last = smaller<int>(tile.first[axis] + block_side(plan, axis), tile.length[axis]) - 1;
    box.begin[axis] = partner_bounds<kOwnsKeys>(problem, plan, tile, axis, tile.first[axis]).begin;
    box.size[axis] = partner_bounds<kOwnsKeys>(problem, plan, tile, axis, last).end - box.begin[axis];
  }
}

// Finds a block's tile, and what its tokens see. Returns whether there are any.
template <bool kOwnsKeys>
NATTEN2_DEVICE bool find_owned(const Problem& problem, const Plan& plan, uint32_t item, Owned& owned) {
  // The tokens of the tile before may still be in use.
  sync_block();
  if (thread_index() == 0) {
    find_tile(problem, plan, item, owned.tile);
    if (!owned.tile.is_empty) {
      find_partners<kOwnsKeys>(problem, plan, owned.tile, owned.partners);
      NATTEN2_UNROLL
      for (int axis = 0; axis < kAxes; ++axis)
        owned.chunks[axis] = (owned.partners.size[axis] + plan.chunk[axis] - 1) / plan.chunk[axis];
    }
  }
  sync_block();
  const Tile& tile = owned.tile;
  if (tile.is_empty) return false;
  // Both halves of a warp compute the same, so that all lanes take part in its reductions; one half writes.
  uint32_t row = lane_index() % kRows, warp = warp_index();
  const bool writes = lane_index() < kRows;
  Token& token = owned.tokens[warp_index() * kRows + row];
  Box& box = owned.partners_of_warp[warp_index()];
  int position[kAxes];
  bool exists = true;
  NATTEN2_UNROLL
  for (int axis = kAxes - 1; axis >= 0; --axis) {
    const uint32_t in_row = row & ((1u << plan.warp_tile[axis]) - 1), in_block = warp & ((1u << plan.warps[axis]) - 1);
    row >>= plan.warp_tile[axis];
    warp >>= plan.warps[axis];
    position[axis] = tile.first[axis] + static_cast<int>((in_block << plan.warp_tile[axis]) + in_row);
    exists &= position[axis] < tile.length[axis];
    // One that isn't there is its last neighbor, and sees nothing.
    position[axis] = smaller<int>(position[axis], tile.length[axis] - 1);
  }
  if (writes) token.exists = exists;
  NATTEN2_UNROLL
  for (int axis = 0; axis < kAxes; ++axis) {
    const auto bounds = partner_bounds<kOwnsKeys>(problem, plan, tile, axis, position[axis]);
    const int begin = smallest_of_warp(exists ? bounds.begin : INT32_MAX);
    const int end = largest_of_warp(exists ? bounds.end : 0);
    if (writes) {
      token.position[axis] = position[axis];
      token.begin[axis] = bounds.begin;
      token.end[axis] = bounds.end;
    }
    if (lane_index() == 0) {
      box.begin[axis] = begin;
      box.size[axis] = larger<int>(end - smaller<int>(begin, end), 0);
    }
  }
  sync_warp();
  return true;
}

// The chunks of a tile: boxes of partners for each head that takes part, then those of additional keys.
class Chunks {
 public:
  NATTEN2_DEVICE Chunks(const Plan& plan, const Owned& owned, int members, int additional)
      : plan_(plan), owned_(owned), members_(members), additional_(additional) {}

  NATTEN2_DEVICE int count() const {
    return boxes() * members_ + (additional_ + plan_.chunk_rows - 1) / plan_.chunk_rows;
  }
  NATTEN2_DEVICE bool is_additional(int step) const { return additional_ > 0 && step >= boxes() * members_; }
  NATTEN2_DEVICE int member(int step) const { return members_ == 1 ? 0 : step / boxes(); }

  NATTEN2_DEVICE Box find(int step) const {
    if (is_additional(step)) {
      const int first = (step - boxes() * members_) * plan_.chunk_rows;
      return {{0, 0, first}, {1, 1, smaller<int>(plan_.chunk_rows, additional_ - first)}};
    }
    int number = step;
    Box chunk;
    NATTEN2_UNROLL
    for (int axis = kAxes - 1; axis >= 0; --axis) {
      const int count = owned_.chunks[axis], next = quotient<int>(number, count), along = number - next * count;
      // After its last box comes the next member's first.
      number = next;
      const int first = along * plan_.chunk[axis];
      chunk.begin[axis] = owned_.partners.begin[axis] + first;
      chunk.size[axis] = smaller<int>(plan_.chunk[axis], owned_.partners.size[axis] - first);
    }
    return chunk;
  }

 private:
  NATTEN2_DEVICE int boxes() const { return owned_.chunks[0] * owned_.chunks[1] * owned_.chunks[2]; }

  const Plan& plan_;
  const Owned& owned_;
  int members_, additional_;
};

// How much an offset along each axis adds to the index of a head's bias.
NATTEN2_DEVICE void find_bias_strides(const Problem& problem, uint32_t (&strides)[kAxes]) {
  uint32_t stride = 1;
  NATTEN2_UNROLL
  for (int axis = kAxes - 1; axis >= 0; --axis) {
    strides[axis] = stride;
    stride *= 2 * problem.axes[axis].kernel_size - 1;
  }
}

// What a warp has to know of a partner, at hand for every lane.
struct Entry {
  uint32_t place;   // inside the warp's part of the chunk
  uint32_t offset;  // what it adds to the index of a pair's bias, in bytes
};

// A warp's part of a chunk, numbered through. Indices of the bias count in bytes.
template <int kRowBytes>
class Portion {
 public:
  // `sign` is 1 where partners are keys, and -1 where they are queries.
  NATTEN2_DEVICE Portion(const Problem& problem, const Box& chunk, const Owned& owned, bool is_additional, int sign,
                         Entry* entries, uint16_t* offsets)
      : entries_(entries), offsets_(offsets) {
    const Box& seen = owned.partners_of_warp[warp_index()];
    Box box;
    NATTEN2_UNROLL
    for (int axis = 0; axis < kAxes; ++axis) {
      box.begin[axis] = is_additional ? chunk.begin[axis] : larger<int>(chunk.begin[axis], seen.begin[axis]);
      const int end = chunk.begin[axis] + chunk.size[axis], own_end = seen.begin[axis] + seen.size[axis];
      box.size[axis] = larger<int>((is_additional ? end : smaller<int>(end, own_end)) - box.begin[axis], 0);
    }
    count_ = seen.size[0] > 0 ? box.count() : 0;
    if (count_ == 0) return;
    const Numbering numbering(box.size);
    uint32_t bias[kAxes];
    find_bias_strides(problem, bias);
    const int first = row_of(chunk, box, 0, 0, 0), padded = (count_ + kRows - 1) / kRows * kRows;
    NATTEN2_ROLL
    for (int n = static_cast<int>(lane_index()); n < padded; n += kLanes) {
      Entry entry = {kNowhere, 0};
      int row = first;
      if (n < count_) {
        int at[kAxes];
        numbering.find(n, at);
        row = row_of(chunk, box, at[0], at[1], at[2]);
        entry.place = static_cast<uint32_t>(at[0]) << 2 * kField | static_cast<uint32_t>(at[1]) << kField |
                      static_cast<uint32_t>(at[2]);
        NATTEN2_UNROLL
        for (int axis = 0; axis < kAxes; ++axis)
          entry.offset += static_cast<uint32_t>(sign * (box.begin[axis] + at[axis])) * bias[axis] * 4;
      }
      entries_[n] = entry;
      offsets_[n] = static_cast<uint16_t>(row_offset<kRowBytes>(row));
    }
    // An owned token sees the places from begin to end along each axis: `place + above_begin` and `below_end - place`
    // leave all guards standing.
    const Token& token = owned.tokens[warp_index() * kRows + lane_index() % kRows];
    uint32_t above_begin = 0, below_end = 0;
    NATTEN2_UNROLL
    for (int axis = 0; axis < kAxes; ++axis) {
      const int size = box.size[axis];
      int begin = smaller<int>(larger<int>(token.begin[axis] - box.begin[axis], 0), size);
      int end = smaller<int>(larger<int>(token.end[axis] - box.begin[axis], 0), size);
      if (is_additional) begin = 0, end = size;
      if (!token.exists) end = 0;
      above_begin = above_begin << kField | static_cast<uint32_t>(kMostChunkSide + 1 - begin);
      below_end = below_end << kField | static_cast<uint32_t>(kMostChunkSide + end);
    }
    NATTEN2_UNROLL
    for (int half = 0; half < 2; ++half) {
      above_begin_[half] = shuffle(above_begin, lane_index() / 4 + 8 * half);
      below_end_[half] = shuffle(below_end, lane_index() / 4 + 8 * half);
    }
    sync_warp();
  }

  NATTEN2_DEVICE int count() const { return count_; }
  // Where the rows of partners from `first` on are, in the chunk's memory.
  NATTEN2_DEVICE const uint16_t* offsets(int first) const { return offsets_ + first; }

  // Partners first + 8 * j + 2 * (lane % 4) and the next one.
  NATTEN2_DEVICE void find_pair(int first, int j, Entry (&pair)[2]) const {
    const Words words = *reinterpret_cast<const Words*>(entries_ + first + 8 * j + 2 * (lane_index() % 4));
    pair[0] = {words.word[0], words.word[1]};
    pair[1] = {words.word[2], words.word[3]};
  }

  // Whether token lane / 4 + 8 * half sees a partner.
  NATTEN2_DEVICE bool is_visible(int half, uint32_t place) const {
    return ((place + above_begin_[half]) & (below_end_[half] - place) & kGuards) == kGuards;
  }

 private:
  NATTEN2_DEVICE static int row_of(const Box& chunk, const Box& box, int z, int y, int x) {
    return ((box.begin[0] - chunk.begin[0] + z) * chunk.size[1] + box.begin[1] - chunk.begin[1] + y) * chunk.size[2] +
           box.begin[2] - chunk.begin[2] + x;
  }

  Entry* entries_;
  uint16_t* offsets_;
  int count_;
  uint32_t above_begin_[2], below_end_[2];
};

NATTEN2_DEVICE int64_t head_offset(const View& view, int batch, int head) {
  return batch * view.batch + head * view.head;
}

NATTEN2_DEVICE int64_t token_offset(const View& view, const Tile& tile, const int (&position)[kAxes]) {
  int64_t offset = 0;
  NATTEN2_UNROLL
  for (int axis = 0; axis < kAxes; ++axis)
    offset += static_cast<int64_t>(tile.group[axis] + position[axis] * tile.gap[axis]) * view.axis[axis];
  return offset;
}

// Where a lane's piece of a box's rows comes from. Steps count in pieces, so that 32 bits hold them.
struct Source {
  const unsigned char* from;
  int32_t step[kAxes];
  bool is_there;

  NATTEN2_DEVICE Source(const View& view, const Tile& tile, const Box& box, int64_t head, uint32_t byte, int row_bytes,
                        int number_bytes, bool is_additional) {
    is_there = byte < static_cast<uint32_t>(row_bytes);
    from = static_cast<const unsigned char*>(view.data) + head * number_bytes + (is_there ? byte : 0);
    NATTEN2_UNROLL
    for (int axis = 0; axis < kAxes; ++axis) {
      const int gap = is_additional ? 1 : tile.gap[axis], group = is_additional ? 0 : tile.group[axis];
      const int64_t stride = view.axis[axis] * number_bytes;
      from += static_cast<int64_t>(group + box.begin[axis] * gap) * stride;
      step[axis] = static_cast<int32_t>(gap * stride / kPieceBytes);
    }
  }

  NATTEN2_DEVICE const void* row(const int (&at)[kAxes]) const {
    const auto along = [&](int axis) { return static_cast<int64_t>(at[axis]) * step[axis]; };
    return from + (along(0) + along(1) + along(2)) * kPieceBytes;
  }
};

// Starts to load the rows of a box of partners, of two tensors side by side.
template <class Number, int kChannels>
NATTEN2_DEVICE void load_box(unsigned char* first, unsigned char* second, const View (&views)[2],
                             const int64_t (&heads)[2], const int (&channels)[2], const Tile& tile, const Box& box,
                             const Numbering& numbering, bool is_additional) {
  constexpr int kRowBytes = kChannels * Number::kBytes, kPieces = kRowBytes / kPieceBytes;
  const uint32_t piece = thread_index() % kPieces;
  const Source sources[2] = {
      {views[0], tile, box, heads[0], piece * kPieceBytes, channels[0] * Number::kBytes, Number::kBytes, is_additional},
      {views[1], tile, box, heads[1], piece * kPieceBytes, channels[1] * Number::kBytes, Number::kBytes,
       is_additional}};
  const int count = box.count();
  NATTEN2_ROLL
  for (int row = static_cast<int>(thread_index() / kPieces); row < count; row += kThreads / kPieces) {
    int at[kAxes];
    numbering.find(row, at);
    const uint32_t offset = row_offset<kRowBytes>(row) ^ piece * kPieceBytes;
    copy_16(first + offset, sources[0].row(at), sources[0].is_there);
    copy_16(second + offset, sources[1].row(at), sources[1].is_there);
  }
}

// Starts to load one number for each token of a box.
NATTEN2_DEVICE void load_numbers(float* numbers, const View& view, const Tile& tile, const Box& box,
                                 const Numbering& numbering, int64_t head) {
  NATTEN2_ROLL
  for (int row = static_cast<int>(thread_index()); row < box.count(); row += kThreads) {
    int at[kAxes];
    numbering.find(row, at);
    NATTEN2_UNROLL
    for (int axis = 0; axis < kAxes; ++axis) at[axis] += box.begin[axis];
    copy_4(numbers + row, static_cast<const float*>(view.data) + head + token_offset(view, tile, at));
  }
}

// Starts to load the rows that a warp owns.
template <class Number, int kChannels>
NATTEN2_DEVICE void load_owned(unsigned char* rows, const View& view, const Owned& owned, int64_t head, int channels) {
  constexpr int kRowBytes = kChannels * Number::kBytes, kPieces = kRowBytes / kPieceBytes;
  const auto* from = static_cast<const unsigned char*>(view.data) + head * Number::kBytes;
  NATTEN2_ROLL
  for (uint32_t i = lane_index(); i < kRows * kPieces; i += kLanes) {
    const uint32_t row = warp_index() * kRows + i / kPieces, piece = i % kPieces;
    const bool is_there = piece * kPieceBytes < static_cast<uint32_t>(channels) * Number::kBytes;
    const int64_t offset = token_offset(view, owned.tile, owned.tokens[row].position) * Number::kBytes;
    copy_16(piece_of<kRowBytes>(rows, row, piece), from + offset + (is_there ? piece * kPieceBytes : 0), is_there);
  }
}

// Puts 0 for what isn't finite, in rows that have arrived.
template <class Number>
NATTEN2_DEVICE void keep_finite(unsigned char* rows, int bytes) {
  auto* words = reinterpret_cast<uint32_t*>(rows);
  NATTEN2_ROLL
  for (int i = static_cast<int>(thread_index()); i < bytes / 4; i += kThreads) words[i] = Number::keep_finite(words[i]);
}

// Writes a warp's sums to the rows that it owns, by way of the shared memory where these lay, 16 bytes at a time.
template <class Number, int kChannels, int kColumns>
NATTEN2_DEVICE void store_owned(const View& view, const Owned& owned, int64_t head, int channels, int first,
                                const float (&sum)[kColumns / 8][4], const float (&factor)[2],
                                unsigned char* rows_of_block) {
  constexpr int kRowBytes = kChannels * Number::kBytes, kPieces = kColumns * Number::kBytes / kPieceBytes;
  unsigned char* rows = rows_of_block + warp_index() * kRows * kRowBytes;
  sync_warp();
  NATTEN2_UNROLL
  for (int n = 0; n < kColumns / 8; ++n) {
    const uint32_t byte = (8 * n + 2 * (lane_index() % 4)) * Number::kBytes;
    NATTEN2_UNROLL
    for (int half = 0; half < 2; ++half)
      Number::store_pair(
          piece_of<kRowBytes>(rows, lane_index() / 4 + 8 * half, byte / kPieceBytes) + byte % kPieceBytes,
          sum[n][2 * half] * factor[half], sum[n][2 * half + 1] * factor[half]);
  }
  sync_warp();
  auto* to = static_cast<unsigned char*>(view.data) + (head + first) * Number::kBytes;
  NATTEN2_ROLL
  for (uint32_t i = lane_index(); i < kRows * kPieces; i += kLanes) {
    const uint32_t row = i / kPieces, piece = i % kPieces;
    const Token& token = owned.tokens[warp_index() * kRows + row];
    if (!token.exists || channels <= first ||
        piece * kPieceBytes >= static_cast<uint32_t>(channels - first) * Number::kBytes)
      continue;
    const int64_t offset = token_offset(view, owned.tile, token.position) * Number::kBytes;
    *reinterpret_cast<Words*>(to + offset + piece * kPieceBytes) =
        *reinterpret_cast<const Words*>(piece_of<kRowBytes>(rows, row, piece));
  }
}

}  // namespace natten2::cuda
