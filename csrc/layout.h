// Where the factors of all adapters and projections of one layer lie in packed storage. No torch types.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace fastlora {

// Blocks are ordered adapter by adapter, then projection by projection. Offsets count elements.
class RankLayout {
 public:
  // ranks[adapter][projection] >= 0; throws std::invalid_argument that names the argument.
  RankLayout(std::vector<std::vector<int64_t>> ranks, std::vector<int64_t> out_features, int64_t in_features);

  int64_t num_adapters() const { return static_cast<int64_t>(ranks_.size()); }
  int64_t num_projections() const { return static_cast<int64_t>(out_features_.size()); }
  int64_t in_features() const { return in_features_; }
  const std::vector<int64_t>& out_features() const { return out_features_; }
  const std::vector<std::vector<int64_t>>& ranks() const { return ranks_; }

  int64_t total_rank() const { return rank_offsets_.back(); }
  int64_t a_numel() const { return a_offsets_.back(); }
  int64_t b_numel() const { return b_offsets_.back(); }
  // Prefix sums with num_adapters * num_projections + 1 entries.
  const std::vector<int64_t>& rank_offsets() const { return rank_offsets_; }
  const std::vector<int64_t>& a_offsets() const { return a_offsets_; }
  const std::vector<int64_t>& b_offsets() const { return b_offsets_; }
  // Prefix sums of out_features, with num_projections + 1 entries.
  const std::vector<int64_t>& column_offsets() const { return column_offsets_; }

  // The same layer with other ranks for one adapter.
  RankLayout with_ranks(int64_t adapter, std::vector<int64_t> ranks) const;

  bool operator==(const RankLayout& other) const;
  std::string to_string() const;

 private:
  void pack();

  std::vector<std::vector<int64_t>> ranks_;
  std::vector<int64_t> out_features_;
  int64_t in_features_;
  std::vector<int64_t> rank_offsets_, a_offsets_, b_offsets_, column_offsets_;
};

}  // namespace fastlora
