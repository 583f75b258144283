// The phases of the stencil's forward, each on its own: four query rows in the middle of an image of 56 x 56 tokens, as
// level 1 of NAT-Tiny has them, with 2 heads of 32 channels in float32 and a window of 7 x 7.
#include <cmath>
#include <memory>
#include <vector>

#include "../natten2/csrc/cpu/stencil_forward.h"

namespace natten2::cpu {
namespace {

constexpr int64_t kLength = 56, kHeads = 2, kChannels = 32, kWindow = 7;
constexpr int64_t kTokens = kLength * kLength * kHeads;

std::vector<float> numbers(int64_t count) {
  std::vector<float> result(count);
  for (int64_t i = 0; i < count; ++i) result[i] = std::sin(static_cast<float>(i));
  return result;
}

View view(std::vector<float>& tensor) {
  const int64_t token = static_cast<int64_t>(tensor.size()) / (kLength * kLength);
  return {tensor.data(), 0, {0, kLength * token, token}, token / kHeads};
}

Problem problem() {
  const Axis axis = {kLength, kWindow, 1, 1, false};
  return {1, {{1, 1, 1, 1, false}, axis, axis}, kHeads, kHeads, kChannels, kChannels, 0, 0.2};
}

class Tile {
 public:
  Tile() : stencil_(args_, cut_, arena_), walk_(args_, cut_, arena_) {
    stencil_.run({}, 0, 1);
    walk_.start({});
    walk_.columns.query_offsets(args_.query, 1, query_offsets_.data());
    walk_.columns.key_offsets(args_.key, key_offsets_.data());
    for_each_row_tile(args_.problem, kLength, 1, 0, {kLength / 2, kLength / 2 + kRows}, [&](const RowTile& tile) {
      tile_ = tile;
      walk_.find_key_rows(tile, [](const SheetWalk::KeyRow&) {});
    });
  }

  // Keys and queries by channel, and values widened: four rows of each are new to a tile.
  void load() {
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = walk_.row_offset(args_.key, 0, tile_.p1[r]);
      load_by_channel(key_.data() + row, key_offsets_.data(), walk_.columns.keys(), kChannels,
                      keys_.data() + r * kChannels * pitch(), pitch());
      load_by_token(value_.data() + row, key_offsets_.data(), walk_.columns.keys(), kChannels, values_.data());
      for (int64_t b = 0; b < walk_.columns.blocks(); ++b) {
        const Block& block = walk_.columns.block_at(b);
        load_by_channel(query_.data() + row, query_offsets_.data() + block.first, block.count, kChannels,
                        queries_.data() + r * kChannels * kLanes, kLanes);
      }
    }
  }

  void score() {
    for (int64_t b = 0; b < walk_.columns.blocks(); ++b)
      walk_.score_block<false>(tile_, b, keys_.data(), queries_.data(), kChannels, false, 0.2f, scores_.data(),
                               [](int64_t) { return Ahead{}; });
  }

  void softmax() {
    for (int64_t b = 0; b < walk_.columns.blocks(); ++b) {
      for (int r = 0; r < kRows; ++r) {
        stencil_.weigh(tile_, r, walk_.columns.block_at(b));
        stencil_.write_logsumexp(tile_, r, walk_.columns.block_at(b));
      }
    }
  }

  void sum_values() {
    for (int64_t b = 0; b < walk_.columns.blocks(); ++b) stencil_.sum_values(tile_, walk_.columns.block_at(b));
  }

  // Also part of the sums.
  void store() {
    for (int r = 0; r < kRows; ++r)
      for (int64_t column = 0; column < walk_.columns.queries(); ++column)
        for (int64_t channel = 0; channel < kChannels; channel += kLanes)
          narrow_some(
              load_lanes(values_.data() + channel),
              output_.data() + walk_.row_offset(args_.output, 0, tile_.p1[r]) + query_offsets_[column] + channel,
              kChannels - channel);
  }

  // A whole image.
  void run() { stencil_.run({}, 0, 1); }

 private:
  int64_t pitch() const { return walk_.sizes.pitch; }

  std::vector<float> query_ = numbers(kTokens * kChannels), key_ = query_, value_ = query_, output_ = query_,
                     logsumexp_ = numbers(kTokens);
  const Forward args_ = {problem(), view(query_), view(key_),    view(value_),    {},
                         {},        nullptr,      view(output_), view(logsumexp_)};
  const Cut cut_ = cut(args_.problem, Visit::kOwned, 1);
  std::vector<Lanes> scratch_ = std::vector<Lanes>(1 << 18);
  Arena arena_{scratch_.data()};
  StencilForward<float> stencil_;
  SheetWalk walk_;
  RowTile tile_ = {};
  std::vector<int64_t> query_offsets_ = std::vector<int64_t>(cut_.most_queries),
                       key_offsets_ = std::vector<int64_t>(cut_.most_keys);
  std::vector<float> keys_ = numbers(walk_.slots.size() * kChannels * pitch()),
                     values_ = numbers(cut_.most_keys * kChannels), queries_ = numbers(kRows * kChannels * kLanes),
                     scores_ = numbers(kRows * walk_.sizes.window_scores);
};

void (Tile::* const kPhases[])() = {&Tile::load,       &Tile::score, &Tile::softmax,
                                    &Tile::sum_values, &Tile::store, &Tile::run};

}  // namespace
}  // namespace natten2::cpu

extern "C" void phases_run(int phase) {
  static natten2::cpu::Tile tile;
  (tile.*natten2::cpu::kPhases[phase])();
}
