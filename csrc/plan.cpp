// The checks of a plan's steps, so that running it needs none.
#include <algorithm>

#include "plan_builder.h"

namespace fastlora::plan {
namespace {

int32_t dtype_index(const std::string& name) {
  const auto* end = kDtypes + kDtypeCount;
  const auto* found = std::find(kDtypes, end, name);
  if (found == end) throw std::invalid_argument("dtype: expected a type that plans know, got " + name);
  return static_cast<int32_t>(found - kDtypes);
}

void check_strides(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  if (sizes.size() != strides.size()) throw wrong("strides", "one for each size", static_cast<int64_t>(strides.size()));
  for (const int64_t size : sizes) {
    if (size < 0) throw wrong("sizes", "0 or more", size);
  }
}

}  // namespace

std::invalid_argument wrong(const std::string& name, const std::string& expected, int64_t got) {
  return std::invalid_argument(name + ": expected " + expected + ", got " + std::to_string(got));
}

Argument argument(const std::string& kind, bool optional, std::vector<int64_t> ints, double number,
                  const std::string& dtype) {
  static const std::pair<const char*, Argument::Kind> kinds[] = {
      {"none", Argument::Kind::kNone}, {"tensor", Argument::Kind::kTensor}, {"tensors", Argument::Kind::kTensors},
      {"int", Argument::Kind::kInt},   {"ints", Argument::Kind::kInts},     {"float", Argument::Kind::kFloat},
      {"bool", Argument::Kind::kBool}, {"dtype", Argument::Kind::kDtype}};
  const auto* found = std::find_if(std::begin(kinds), std::end(kinds), [&](const auto& k) { return k.first == kind; });
  if (found == std::end(kinds)) {
    throw std::invalid_argument("arguments: expected a kind that plans know, got " + kind);
  }
  Argument made{found->second, optional, {}, {}, number};
  if (made.kind == Argument::Kind::kTensor || made.kind == Argument::Kind::kTensors) {
    made.slots.assign(ints.begin(), ints.end());
  } else if (made.kind == Argument::Kind::kDtype) {
    made.ints = {dtype_index(dtype)};
  } else {
    made.ints = std::move(ints);
  }
  return made;
}

Builder::Builder(int32_t inputs, int32_t constants) {
  if (inputs < 1) throw wrong("inputs", "1 or more", inputs);
  if (constants < 0) throw wrong("constants", "0 or more", constants);
  plan_->inputs = inputs;
  plan_->constants = constants;
  held_.assign(static_cast<size_t>(inputs + constants), true);
}

Slot Builder::allocate(const std::string& dtype, std::vector<int64_t> sizes, std::vector<int64_t> strides, bool zero) {
  check_strides(sizes, strides);
  const int32_t index = dtype_index(dtype);
  const Slot out = make();
  add(Allocate{out, index, zero, std::move(sizes), std::move(strides)});
  return out;
}

void Builder::fill(Slot out, double number) {
  check("out", out);
  add(Fill{out, number});
}

Slot Builder::view(Slot base, std::vector<int64_t> sizes, std::vector<int64_t> strides, int64_t offset) {
  check_strides(sizes, strides);
  check("base", base);
  const Slot out = make();
  add(View{out, base, std::move(sizes), std::move(strides), offset});
  return out;
}

void Builder::multiply(Slot out, Slot added, Slot a, Slot b) {
  for (const Slot slot : {out, a, b}) check("operand", slot);
  if (added != -1) check("added", added);
  add(Multiply{out, added, a, b});
}

std::vector<Slot> Builder::call(const std::string& name, const std::string& overload, std::vector<Argument> arguments,
                                const std::vector<bool>& results) {
  for (const Argument& argument : arguments) {
    for (const Slot slot : argument.slots) check("arguments", slot);
  }
  Call call{name, overload, std::move(arguments), {}};
  std::vector<Slot> kept;
  for (const bool keep : results) {
    call.results.push_back(keep ? make() : -1);
    if (keep) kept.push_back(call.results.back());
  }
  add(std::move(call));
  return kept;
}

void Builder::launch(const std::string& name, uint64_t function, const std::vector<uint32_t>& grid,
                     const std::vector<uint32_t>& block, uint32_t shared_bytes,
                     const std::vector<std::pair<int32_t, std::vector<uint32_t>>>& attributes,
                     std::vector<uint64_t> values, const std::vector<std::tuple<int32_t, Slot, int64_t>>& holes) {
  if (grid.size() != 3) throw wrong("grid", "3 numbers", static_cast<int64_t>(grid.size()));
  if (block.size() != 3) throw wrong("block", "3 numbers", static_cast<int64_t>(block.size()));
  Launch launch{name, function, {}, {}, shared_bytes, {}, std::move(values), {}};
  std::copy_n(grid.begin(), 3, launch.grid);
  std::copy_n(block.begin(), 3, launch.block);
  for (const auto& [id, words] : attributes) {
    if (words.size() > 16) throw wrong("attributes", "at most 16 words", static_cast<int64_t>(words.size()));
    Attribute attribute{id, 0, {}};
    std::copy(words.begin(), words.end(), attribute.value);
    launch.attributes.push_back(attribute);
  }
  for (const auto& [position, slot, bytes] : holes) {
    if (position < 0 || position >= static_cast<int64_t>(launch.values.size())) {
      throw wrong("holes", "a position among the " + std::to_string(launch.values.size()) + " values", position);
    }
    check("holes", slot);
    launch.holes.push_back({position, slot, bytes});
  }
  plan_->most_values = std::max(plan_->most_values, launch.values.size());
  add(std::move(launch));
}

void Builder::release(const std::vector<Slot>& slots) {
  if (plan_->steps.empty()) throw std::invalid_argument("slots: expected a step that they are released after");
  for (const Slot slot : slots) {
    check("slots", slot);
    if (slot < plan_->inputs + plan_->constants) throw wrong("slots", "tensors that the plan made", slot);
    held_[static_cast<size_t>(slot)] = false;
    plan_->steps.back().released.push_back(slot);
  }
}

std::shared_ptr<const Plan> Builder::finish(std::vector<Slot> results) {
  if (results.empty()) throw wrong("results", "1 or more", 0);
  for (const Slot slot : results) {
    if (slot != -1) check("results", slot);
  }
  plan_->results = std::move(results);
  plan_->slots = static_cast<int32_t>(held_.size());
  std::shared_ptr<const Plan> done = std::move(plan_);
  plan_ = std::make_shared<Plan>();
  held_.clear();
  return done;
}

void Builder::add(std::variant<Allocate, Fill, View, Multiply, Call, Launch> action) {
  plan_->steps.push_back({std::move(action), {}});
}

Slot Builder::make() {
  held_.push_back(true);
  return static_cast<Slot>(held_.size() - 1);
}

void Builder::check(const char* name, Slot slot) const {
  if (slot < 0 || slot >= static_cast<int64_t>(held_.size()) || !held_[static_cast<size_t>(slot)]) {
    throw wrong(name, "a slot that holds a tensor", slot);
  }
}

}  // namespace fastlora::plan
