#include "layout.h"

#include <sstream>
#include <stdexcept>
#include <utility>

namespace fastlora {
namespace {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// first + left * right, refused where it does not fit in 64 bits.
int64_t add_product(int64_t first, int64_t left, int64_t right, const char* name) {
  int64_t product, sum;
  if (__builtin_mul_overflow(left, right, &product) || __builtin_add_overflow(first, product, &sum)) {
    fail(name, " is too large: ", first, " + ", left, " * ", right, " does not fit in 64 bits");
  }
  return sum;
}

void check_ranks(const std::vector<int64_t>& ranks, size_t adapter, size_t projections) {
  if (ranks.size() != projections) {
    fail("ranks[", adapter, "] has ", ranks.size(), " entries, but out_features has ", projections);
  }
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (ranks[i] < 0) fail("ranks[", adapter, "][", i, "] is ", ranks[i], "; accepted: 0 or more");
  }
}

void write_list(std::ostream& out, const std::vector<int64_t>& values) {
  out << '[';
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << ']';
}

}  // namespace

RankLayout::RankLayout(std::vector<std::vector<int64_t>> ranks, std::vector<int64_t> out_features, int64_t in_features)
    : ranks_(std::move(ranks)), out_features_(std::move(out_features)), in_features_(in_features) {
  if (out_features_.empty()) fail("out_features is empty; one entry per projection is needed");
  for (size_t i = 0; i < out_features_.size(); ++i) {
    if (out_features_[i] < 1) fail("out_features[", i, "] is ", out_features_[i], "; accepted: 1 or more");
  }
  if (in_features_ < 1) fail("in_features is ", in_features_, "; accepted: 1 or more");
  for (size_t g = 0; g < ranks_.size(); ++g) check_ranks(ranks_[g], g, out_features_.size());
  pack();
}

void RankLayout::pack() {
  column_offsets_ = rank_offsets_ = a_offsets_ = b_offsets_ = {0};
  for (const int64_t width : out_features_) {
    column_offsets_.push_back(add_product(column_offsets_.back(), width, 1, "out_features"));
  }
  for (const std::vector<int64_t>& of_adapter : ranks_) {
    for (size_t i = 0; i < of_adapter.size(); ++i) {
      rank_offsets_.push_back(add_product(rank_offsets_.back(), of_adapter[i], 1, "ranks"));
      a_offsets_.push_back(add_product(a_offsets_.back(), of_adapter[i], in_features_, "ranks"));
      b_offsets_.push_back(add_product(b_offsets_.back(), of_adapter[i], out_features_[i], "ranks"));
    }
  }
}

RankLayout RankLayout::with_ranks(int64_t adapter, std::vector<int64_t> ranks) const {
  if (adapter < 0 || adapter >= num_adapters()) {
    fail("adapter is ", adapter, ", but the layout has ", num_adapters(), " adapters, counted from 0");
  }
  std::vector<std::vector<int64_t>> changed = ranks_;
  changed[static_cast<size_t>(adapter)] = std::move(ranks);
  return RankLayout(std::move(changed), out_features_, in_features_);
}

bool RankLayout::operator==(const RankLayout& other) const {
  return in_features_ == other.in_features_ && out_features_ == other.out_features_ && ranks_ == other.ranks_;
}

std::string RankLayout::to_string() const {
  std::ostringstream out;
  out << "RankLayout(ranks=[";
  for (size_t g = 0; g < ranks_.size(); ++g) {
    out << (g ? ", " : "");
    write_list(out, ranks_[g]);
  }
  out << "], out_features=";
  write_list(out, out_features_);
  out << ", in_features=" << in_features_ << ")";
  return out.str();
}

}  // namespace fastlora
