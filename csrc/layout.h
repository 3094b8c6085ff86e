// Where the factors of all adapters and projections of one layer lie in packed storage. No torch types.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace fastlora {

// What every adapter of the layer has in common; prefix sums start with 0 and end with the total.
struct LayerShape {
  std::vector<int64_t> out_features, column_offsets;
  int64_t in_features;
};

// One adapter's packing, never changed once made. Offsets are its own: prefix sums over the projections.
struct AdapterPacking {
  std::vector<int64_t> ranks, rank_offsets, a_offsets, b_offsets;
};

// Rows of one tile of a kernel: `rows` of them from position `first`, all of one adapter.
struct Tile {
  int64_t adapter, first, rows;
};

// Blocks are ordered adapter by adapter, then projection by projection. Offsets count elements. A layout is a value:
// changes return another one, which shares the operand_caches of all adapters that did not change.
class RankLayout {
 public:
  // ranks[adapter][projection] >= 0; throws std::invalid_argument that names the argument.
  RankLayout(const std::vector<std::vector<int64_t>>& ranks, std::vector<int64_t> out_features, int64_t in_features);

  int64_t num_adapters() const { return static_cast<int64_t>(adapters_.size()); }
  int64_t num_projections() const { return static_cast<int64_t>(shape_->out_features.size()); }
  int64_t in_features() const { return shape_->in_features; }
  const std::vector<int64_t>& out_features() const { return shape_->out_features; }
  const std::vector<int64_t>& column_offsets() const { return shape_->column_offsets; }
  std::vector<std::vector<int64_t>> ranks() const;

  int64_t total_rank() const { return starts_.back().rank; }
  int64_t a_numel() const { return starts_.back().a; }
  int64_t b_numel() const { return starts_.back().b; }
  // Prefix sums over all blocks, with num_adapters * num_projections + 1 entries.
  std::vector<int64_t> rank_offsets() const { return flat(&AdapterPacking::rank_offsets, &Start::rank); }
  std::vector<int64_t> a_offsets() const { return flat(&AdapterPacking::a_offsets, &Start::a); }
  std::vector<int64_t> b_offsets() const { return flat(&AdapterPacking::b_offsets, &Start::b); }
  // One adapter's columns of h: prefix sums of its ranks, with num_projections + 1 entries.
  const std::vector<int64_t>& adapter_offsets(int64_t adapter) const { return at(adapter).rank_offsets; }
  // The same of all adapters, one after another: what the operators over many adapters take.
  std::vector<int64_t> column_starts() const;
  // Columns of h of a mixed batch: the largest total rank of an adapter, with that adapter's probes.
  int64_t width(const std::vector<int64_t>& probes) const;

  RankLayout add_adapter(const std::vector<int64_t>& ranks) const;
  RankLayout delete_adapter(int64_t adapter) const;
  RankLayout with_ranks(int64_t adapter, const std::vector<int64_t>& ranks) const;
  // The adapters of a batch, in its order; their operand_caches are shared.
  RankLayout select(const std::vector<int64_t>& adapters) const;
  // Adapters whose packing is the same object in both layouts.
  int64_t shared_with(const RankLayout& other) const;

  // Tiles of at most `block` rows over ranges[adapter] = (begin, end); none for an adapter whose ranks are all 0.
  std::vector<Tile> tiles(const std::vector<std::pair<int64_t, int64_t>>& ranges, int64_t block) const;
  // Multiply-adds of one forward: sum over adapters and projections of rows[g] r_gi (in_features + out_features_i).
  int64_t operations(const std::vector<int64_t>& rows) const;
  // Bytes of this object and what it points to; factors of all adapters in elements of item_size bytes.
  int64_t nbytes() const;
  int64_t factor_bytes(int64_t item_size) const;

  bool operator==(const RankLayout& other) const;
  std::string to_string() const;

 private:
  using OperandCache = std::shared_ptr<const AdapterPacking>;
  struct Start {
    int64_t rank = 0, a = 0, b = 0;
  };

  RankLayout(std::shared_ptr<const LayerShape> shape, std::vector<OperandCache> adapters);
  const AdapterPacking& at(int64_t adapter) const;
  std::vector<int64_t> flat(std::vector<int64_t> AdapterPacking::* offsets, int64_t Start::* start) const;
  void place();

  std::shared_ptr<const LayerShape> shape_;
  std::vector<OperandCache> adapters_;
  std::vector<Start> starts_;  // first element of each adapter, then the totals
};

}  // namespace fastlora
