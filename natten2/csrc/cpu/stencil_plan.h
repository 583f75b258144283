// How the stencil cuts a problem up. A line is a dilation group of the last axis in one key head; the lines of a sheet
// stand side by side, as columns, so that rows shorter than a vector fill it. A block is a vector of query columns.
#pragma once

#include "arena.h"
#include "stencil_tile.h"
#include "traverse.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

// Forward, a sheet computes what it owns. Backward, it visits every query that sees a key of its own as well.
enum class Visit { kOwned, kSeeing };

inline Interval visited(Visit visit, const Axis& axis, int64_t length, Interval owned) {
  if (visit == Visit::kOwned || owned.size() <= 0) return owned;
  return {smaller(owned.begin, query_bounds(axis, length, owned.begin).begin),
          larger(owned.end, query_bounds(axis, length, owned.end - 1).end)};
}

// The keys that queries of one group see.
inline Interval seen(const Axis& axis, int64_t length, Interval queries) {
  if (queries.size() <= 0) return {0, 0};
  return {key_bounds(axis, length, queries.begin).begin, key_bounds(axis, length, queries.end - 1).end};
}

struct Cut {
  Visit visit;
  int64_t lines, lines_together, chunks;  // a chunk is the lines of a sheet
  int64_t positions, tiles;               // a tile is what a sheet owns of a line
  int64_t rows, strips;                   // a strip is what it owns of the middle axis
  int64_t most_queries, most_keys;        // columns
  int64_t row_slots[2];                   // key rows of the first two axes that one tile of query rows needs
};

inline Cut cut(const Problem& problem, Visit visit, int64_t tasks) {
  const Axis &axis0 = problem.axes[0], &axis1 = problem.axes[1], &axis2 = problem.axes[2];
  const int64_t length = group_length(axis2, 0), height = group_length(axis1, 0), depth = group_length(axis0, 0);
  const int64_t planes = smaller(depth, axis0.kernel_size);
  const int64_t rows = smaller(height, axis1.kernel_size + kRows + axis1.stride - 2);
  // The keys and values that a tile of query rows needs, of as many columns, fit in the second cache.
  const int64_t fitting = 49152 / (larger(problem.head_dim, problem.value_dim) * planes * rows);
  const int64_t columns = larger(kLanes, smaller(1024, fitting));
  Cut result = {};
  result.visit = visit;
  result.positions = length;
  if (length > columns) {
    const int64_t tiles = (length + columns - 1) / columns;
    result.positions = round_up((length + tiles - 1) / tiles, kLanes);
  }
  result.tiles = (length + result.positions - 1) / result.positions;
  result.lines = problem.key_heads * axis2.dilation;
  result.lines_together = 1;
  // The most columns per lane.
  for (int64_t lines = 2; lines <= smaller(result.lines, columns / length); ++lines)
    if (lines * round_up(result.lines_together * length, kLanes) >
        result.lines_together * round_up(lines * length, kLanes))
      result.lines_together = lines;
  result.chunks = (result.lines + result.lines_together - 1) / result.lines_together;

  int64_t sheets = problem.batch * result.chunks * result.tiles * axis0.dilation * axis1.dilation;
  if (visit == Visit::kOwned) sheets *= depth;
  const int64_t fewest_rows = visit == Visit::kOwned ? axis1.kernel_size : 4 * axis1.kernel_size;
  const int64_t most_rows = visit == Visit::kSeeing && depth > 1 ? 32 : height;
  const int64_t strips = smaller((tasks + sheets - 1) / sheets, larger(1, height / fewest_rows));
  result.rows = smaller(most_rows, round_up((height + strips - 1) / strips, kRows));
  result.strips = (height + result.rows - 1) / result.rows;

  const int64_t reach = visit == Visit::kSeeing ? 2 * (axis2.kernel_size + axis2.stride) : 0;
  const int64_t queries = smaller(length, result.positions + reach);
  result.most_queries = result.lines_together * queries;
  result.most_keys = result.lines_together * smaller(length, queries + 2 * (axis2.kernel_size + axis2.stride));
  result.row_slots[0] = planes;
  result.row_slots[1] = rows;
  return result;
}

struct Sheet {
  int64_t chunk, tile, batch, group0, group1, strip;
};

struct Line {
  int64_t key_head;
  int64_t group;
  Interval owned, queries, keys;  // positions
  int64_t query_column, key_column;
};

struct Block {
  int64_t first, count;  // query columns
  int64_t key;           // the first column that a lane begins at
  Fetch fetch;
  LaneInts index;     // where the lanes begin, from there
  int64_t most_keys;  // that can be fetched together
  bool is_full;       // no query sees fewer keys than others
};

// The columns of a chunk's tile.
class Columns {
 public:
  Columns(const Problem& problem, const Cut& cut, Arena& arena)
      : problem_(problem),
        cut_(cut),
        lines_(arena.take<Line>(cut.lines_together)),
        blocks_(arena.take<Block>(round_up(cut.most_queries, kLanes) / kLanes)),
        start_(arena.take<int32_t>(cut.most_queries)),
        size_(arena.take<int32_t>(cut.most_queries)),
        owned_(arena.take<int32_t>(cut.most_queries)),
        bias_(arena.take<int64_t>(cut.most_queries)) {}

  // Returns whether anything has changed.
  bool start(int64_t chunk, int64_t tile) {
    if (chunk == chunk_ && tile == tile_) return false;
    chunk_ = chunk;
    tile_ = tile;
    const Axis& axis = problem_.axes[2];
    const int64_t first = chunk * cut_.lines_together;
    line_count_ = smaller(cut_.lines_together, cut_.lines - first);
    queries_ = keys_ = 0;
    for (int64_t l = 0; l < line_count_; ++l) {
      Line& line = lines_[l];
      line.key_head = (first + l) / axis.dilation;
      line.group = (first + l) % axis.dilation;
      const int64_t length = group_length(axis, line.group);
      line.owned = {smaller(length, tile * cut_.positions), smaller(length, (tile + 1) * cut_.positions)};
      line.queries = visited(cut_.visit, axis, length, line.owned);
      line.keys = seen(axis, length, line.queries);
      line.query_column = queries_;
      line.key_column = keys_;
      queries_ += line.queries.size();
      keys_ += line.keys.size();
      fill(line, length);
    }
    block_count_ = (queries_ + kLanes - 1) / kLanes;
    for (int64_t b = 0; b < block_count_; ++b) blocks_[b] = block(b * kLanes);
    return true;
  }

  int64_t queries() const { return queries_; }
  int64_t keys() const { return keys_; }
  int64_t blocks() const { return block_count_; }
  const Block& block_at(int64_t b) const { return blocks_[b]; }
  int64_t line_count() const { return line_count_; }
  const Line& line(int64_t l) const { return lines_[l]; }

  // Of each query column: the column of its first key, how many it sees, whether the sheet owns it, and the entry of
  // the bias of its first key, for the first of the query heads that share keys.
  const int32_t* starts() const { return start_; }
  const int32_t* sizes() const { return size_; }
  const int32_t* owned() const { return owned_; }
  const int64_t* bias() const { return bias_; }

  // Writes where each query column, or key column, is in a tensor.
  void query_offsets(const View& view, int64_t heads_per_key, int64_t* out) const {
    for (int64_t l = 0; l < line_count_; ++l) token_offsets(view, lines_[l], heads_per_key, lines_[l].queries, out);
  }
  void key_offsets(const View& view, int64_t* out) const {
    for (int64_t l = 0; l < line_count_; ++l) token_offsets(view, lines_[l], 1, lines_[l].keys, out);
  }

 private:
  void token_offsets(const View& view, const Line& line, int64_t heads_per_key, Interval positions,
                     int64_t*& out) const {
    const int64_t dilation = problem_.axes[2].dilation;
    for (int64_t p = positions.begin; p < positions.end; ++p)
      *out++ = (line.group + p * dilation) * view.axis[2] + line.key_head * heads_per_key * view.head;
  }

  void fill(const Line& line, int64_t length) {
    const Axis& axis = problem_.axes[2];
    const int64_t heads_per_key = group_size(problem_);
    for (int64_t p = line.queries.begin; p < line.queries.end; ++p) {
      const int64_t column = line.query_column + p - line.queries.begin;
      const Interval keys = key_bounds(axis, length, p);
      start_[column] = static_cast<int32_t>(line.key_column + keys.begin - line.keys.begin);
      size_[column] = static_cast<int32_t>(keys.size());
      owned_[column] = line.owned.begin <= p && p < line.owned.end;
      bias_[column] = line.key_head * heads_per_key * offsets(problem_) + keys.begin - p + axis.kernel_size - 1;
    }
  }

  Block block(int64_t first) const {
    Block block = {first, smaller(kLanes, queries_ - first), start_[first], kConsecutive, {}, kLanes, true};
    int64_t last = block.key;
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t start = start_[first + i];
      if (start != start_[first] + i) block.fetch = kPermuted;
      block.key = smaller(block.key, start);
      last = larger(last, start);
      block.is_full = block.is_full && size_[first + i] == problem_.axes[2].kernel_size;
    }
    if (last - block.key >= kLanes || (block.fetch == kPermuted && !kPermutes)) {
      // Two vectors from there on end with the last vector of keys.
      block.key = smaller(block.key, larger(0, round_up(keys_, kLanes) - 2 * kLanes));
      block.fetch = last - block.key < 2 * kLanes ? kPicked : kScattered;
      if (block.fetch == kPicked) block.most_keys = 2 * kLanes - (last - block.key);
    }
    for (int64_t i = 0; i < kLanes; ++i)
      block.index[i] = start_[first + smaller(i, block.count - 1)] - static_cast<int32_t>(block.key);
    return block;
  }

  const Problem& problem_;
  const Cut& cut_;
  int64_t chunk_ = -1, tile_ = -1;
  int64_t line_count_ = 0, queries_ = 0, keys_ = 0, block_count_ = 0;
  Line* lines_;
  Block* blocks_;
  int32_t* start_;
  int32_t* size_;
  int32_t* owned_;
  int64_t* bias_;
};

// Which rows of the first two axes the slots of a buffer hold. Rows are asked for in an order in which the one that a
// new row replaces isn't needed any more.
class RowSlots {
 public:
  RowSlots(int64_t planes, int64_t rows, Arena& arena)
      : planes_(planes), rows_(rows), held_(arena.take<int64_t>(planes * rows)) {}

  void clear() {
    for (int64_t slot = 0; slot < size(); ++slot) held_[slot] = -1;
  }

  int64_t size() const { return planes_ * rows_; }
  int64_t slot(int64_t p0, int64_t p1) const { return p0 % planes_ * rows_ + p1 % rows_; }
  // A row's number, or -1.
  int64_t& held(int64_t slot) { return held_[slot]; }

 private:
  int64_t planes_, rows_;
  int64_t* held_;
};

// Up to kRows query rows that are done together: rows of the middle axis, each once for every query head of a key head.
struct RowTile {
  int count;
  int64_t p0;
  Interval keys0;
  int64_t p1[kRows];
  int64_t head[kRows];  // among those of a key head
  Interval keys1[kRows];
  Interval all_keys1;
};

// Tiles are the same for any cut into strips, so that sums over rows are too.
template <class Act>
inline void for_each_row_tile(const Problem& problem, int64_t height, int64_t depth, int64_t p0, Interval rows,
                              Act&& act) {
  const int64_t heads = group_size(problem);
  RowTile tile = {};
  tile.p0 = p0;
  tile.keys0 = key_bounds(problem.axes[0], depth, p0);
  const int64_t end = rows.end * heads;
  for (int64_t first = rows.begin * heads; first < end;) {
    const int64_t next = smaller(end, (first / kRows + 1) * kRows);
    tile.count = static_cast<int>(next - first);
    for (int r = 0; r < tile.count; ++r) {
      tile.p1[r] = (first + r) / heads;
      tile.head[r] = (first + r) % heads;
      tile.keys1[r] = key_bounds(problem.axes[1], height, tile.p1[r]);
    }
    tile.all_keys1 = {tile.keys1[0].begin, tile.keys1[tile.count - 1].end};
    act(tile);
    first = next;
  }
}

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu
