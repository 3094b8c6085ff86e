#include "layout.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <unordered_set>

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

void check_count(const char* name, size_t given, int64_t adapters) {
  if (static_cast<int64_t>(given) != adapters) {
    fail(name, " has ", given, " entries, but the layout has ", adapters, " adapters");
  }
}

std::shared_ptr<const LayerShape> make_shape(std::vector<int64_t> out_features, int64_t in_features) {
  if (out_features.empty()) fail("out_features is empty; one entry per projection is needed");
  if (in_features < 1) fail("in_features is ", in_features, "; accepted: 1 or more");
  std::vector<int64_t> offsets{0};
  for (size_t i = 0; i < out_features.size(); ++i) {
    if (out_features[i] < 1) fail("out_features[", i, "] is ", out_features[i], "; accepted: 1 or more");
    offsets.push_back(add_product(offsets.back(), out_features[i], 1, "out_features"));
  }
  return std::make_shared<LayerShape>(LayerShape{std::move(out_features), std::move(offsets), in_features});
}

std::shared_ptr<const AdapterPacking> pack(const std::vector<int64_t>& ranks, int64_t adapter,
                                           const LayerShape& shape) {
  const size_t projections = shape.out_features.size();
  if (ranks.size() != projections) {
    fail("ranks[", adapter, "] has ", ranks.size(), " entries, but out_features has ", projections);
  }
  AdapterPacking packing{ranks, {0}, {0}, {0}};
  for (std::vector<int64_t>* offsets : {&packing.rank_offsets, &packing.a_offsets, &packing.b_offsets}) {
    offsets->reserve(projections + 1);
  }
  for (size_t i = 0; i < projections; ++i) {
    const int64_t rank = ranks[i];
    if (rank < 0) fail("ranks[", adapter, "][", i, "] is ", rank, "; accepted: 0 or more");
    packing.rank_offsets.push_back(add_product(packing.rank_offsets.back(), rank, 1, "ranks"));
    packing.a_offsets.push_back(add_product(packing.a_offsets.back(), rank, shape.in_features, "ranks"));
    packing.b_offsets.push_back(add_product(packing.b_offsets.back(), rank, shape.out_features[i], "ranks"));
  }
  return std::make_shared<AdapterPacking>(std::move(packing));
}

void write_list(std::ostream& out, const std::vector<int64_t>& values) {
  out << '[';
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << ']';
}

int64_t heap_bytes(const std::vector<int64_t>& values) {
  return static_cast<int64_t>(values.capacity() * sizeof(int64_t));
}

}  // namespace

RankLayout::RankLayout(const std::vector<std::vector<int64_t>>& ranks, std::vector<int64_t> out_features,
                       int64_t in_features)
    : shape_(make_shape(std::move(out_features), in_features)) {
  adapters_.reserve(ranks.size());
  for (const std::vector<int64_t>& of_adapter : ranks) adapters_.push_back(pack(of_adapter, num_adapters(), *shape_));
  place();
}

RankLayout::RankLayout(std::shared_ptr<const LayerShape> shape, std::vector<OperandCache> adapters)
    : shape_(std::move(shape)), adapters_(std::move(adapters)) {
  place();
}

void RankLayout::place() {
  starts_.reserve(adapters_.size() + 1);
  starts_.emplace_back();
  for (const OperandCache& adapter : adapters_) {
    const Start& last = starts_.back();
    starts_.push_back({add_product(last.rank, adapter->rank_offsets.back(), 1, "ranks"),
                       add_product(last.a, adapter->a_offsets.back(), 1, "ranks"),
                       add_product(last.b, adapter->b_offsets.back(), 1, "ranks")});
  }
}

const AdapterPacking& RankLayout::at(int64_t adapter) const {
  if (adapter < 0 || adapter >= num_adapters()) {
    fail("adapter is ", adapter, ", but the layout has ", num_adapters(), " adapters, counted from 0");
  }
  return *adapters_[static_cast<size_t>(adapter)];
}

std::vector<std::vector<int64_t>> RankLayout::ranks() const {
  std::vector<std::vector<int64_t>> found;
  for (const OperandCache& adapter : adapters_) found.push_back(adapter->ranks);
  return found;
}

std::vector<int64_t> RankLayout::flat(std::vector<int64_t> AdapterPacking::* offsets, int64_t Start::* start) const {
  std::vector<int64_t> found;
  found.reserve(adapters_.size() * shape_->out_features.size() + 1);
  for (size_t g = 0; g < adapters_.size(); ++g) {
    const std::vector<int64_t>& own = (*adapters_[g]).*offsets;
    for (size_t i = 0; i + 1 < own.size(); ++i) found.push_back(starts_[g].*start + own[i]);
  }
  found.push_back(starts_.back().*start);
  return found;
}

int64_t RankLayout::width(const std::vector<int64_t>& probes) const {
  if (!probes.empty()) check_count("probes", probes.size(), num_adapters());
  int64_t widest = 0;
  for (size_t g = 0; g < adapters_.size(); ++g) {
    const int64_t rows = probes.empty() ? 0 : probes[g];
    if (rows < 0) fail("probes[", g, "] is ", rows, "; accepted: 0 or more");
    widest = std::max(widest, add_product(adapters_[g]->rank_offsets.back(), rows, 1, "probes"));
  }
  return widest;
}

std::vector<int64_t> RankLayout::column_starts() const {
  std::vector<int64_t> found;
  found.reserve(adapters_.size() * (shape_->out_features.size() + 1));
  for (const OperandCache& adapter : adapters_) {
    found.insert(found.end(), adapter->rank_offsets.begin(), adapter->rank_offsets.end());
  }
  return found;
}

RankLayout RankLayout::add_adapter(const std::vector<int64_t>& ranks) const {
  std::vector<OperandCache> changed = adapters_;
  changed.push_back(pack(ranks, num_adapters(), *shape_));
  return RankLayout(shape_, std::move(changed));
}

RankLayout RankLayout::delete_adapter(int64_t adapter) const {
  at(adapter);
  std::vector<OperandCache> changed = adapters_;
  changed.erase(changed.begin() + adapter);
  return RankLayout(shape_, std::move(changed));
}

RankLayout RankLayout::with_ranks(int64_t adapter, const std::vector<int64_t>& ranks) const {
  at(adapter);
  std::vector<OperandCache> changed = adapters_;
  changed[static_cast<size_t>(adapter)] = pack(ranks, adapter, *shape_);
  return RankLayout(shape_, std::move(changed));
}

RankLayout RankLayout::select(const std::vector<int64_t>& adapters) const {
  std::vector<OperandCache> chosen;
  chosen.reserve(adapters.size());
  for (const int64_t adapter : adapters) {
    at(adapter);
    chosen.push_back(adapters_[static_cast<size_t>(adapter)]);
  }
  return RankLayout(shape_, std::move(chosen));
}

int64_t RankLayout::shared_with(const RankLayout& other) const {
  const std::unordered_set<OperandCache> mine(adapters_.begin(), adapters_.end());
  return std::count_if(other.adapters_.begin(), other.adapters_.end(),
                       [&](const OperandCache& adapter) { return mine.count(adapter) > 0; });
}

std::vector<Tile> RankLayout::tiles(const std::vector<std::pair<int64_t, int64_t>>& ranges, int64_t block) const {
  check_count("ranges", ranges.size(), num_adapters());
  if (block < 1) fail("block is ", block, "; accepted: 1 or more");
  std::vector<Tile> found;
  for (size_t g = 0; g < ranges.size(); ++g) {
    const auto [begin, end] = ranges[g];
    if (begin < 0 || end < begin) fail("ranges[", g, "] is ", begin, " to ", end, "; accepted: 0 <= begin <= end");
    if (adapters_[g]->rank_offsets.back() == 0) continue;
    for (int64_t first = begin; first < end;) {
      const int64_t rows = std::min(block, end - first);
      found.push_back({static_cast<int64_t>(g), first, rows});
      first += rows;
    }
  }
  return found;
}

int64_t RankLayout::operations(const std::vector<int64_t>& rows) const {
  check_count("rows", rows.size(), num_adapters());
  int64_t sum = 0;
  for (size_t g = 0; g < rows.size(); ++g) {
    if (rows[g] < 0) fail("rows[", g, "] is ", rows[g], "; accepted: 0 or more");
    const int64_t each = add_product(adapters_[g]->a_offsets.back(), adapters_[g]->b_offsets.back(), 1, "ranks");
    sum = add_product(sum, rows[g], each, "rows");
  }
  return sum;
}

int64_t RankLayout::nbytes() const {
  int64_t sum = static_cast<int64_t>(sizeof(RankLayout) + sizeof(LayerShape));
  sum += heap_bytes(shape_->out_features) + heap_bytes(shape_->column_offsets);
  sum += static_cast<int64_t>(adapters_.capacity() * sizeof(OperandCache) + starts_.capacity() * sizeof(Start));
  for (const OperandCache& adapter : adapters_) {
    sum += static_cast<int64_t>(sizeof(AdapterPacking)) + heap_bytes(adapter->ranks);
    sum += heap_bytes(adapter->rank_offsets) + heap_bytes(adapter->a_offsets) + heap_bytes(adapter->b_offsets);
  }
  return sum;
}

int64_t RankLayout::factor_bytes(int64_t item_size) const {
  if (item_size < 1) fail("item_size is ", item_size, "; accepted: 1 or more");
  return add_product(add_product(0, a_numel(), item_size, "ranks"), b_numel(), item_size, "ranks");
}

bool RankLayout::operator==(const RankLayout& other) const {
  const auto same = [](const OperandCache& left, const OperandCache& right) {
    return left == right || left->ranks == right->ranks;
  };
  return in_features() == other.in_features() && out_features() == other.out_features() &&
         std::equal(adapters_.begin(), adapters_.end(), other.adapters_.begin(), other.adapters_.end(), same);
}

std::string RankLayout::to_string() const {
  std::ostringstream out;
  out << "RankLayout(ranks=[";
  for (size_t g = 0; g < adapters_.size(); ++g) {
    out << (g ? ", " : "");
    write_list(out, adapters_[g]->ranks);
  }
  out << "], out_features=";
  write_list(out, out_features());
  out << ", in_features=" << in_features() << ")";
  return out.str();
}

}  // namespace fastlora
