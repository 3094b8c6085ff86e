// Writes a plan down step by step.
#pragma once
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "plan.h"

namespace fastlora::plan {

// "name: expected ..., got ..."
std::invalid_argument wrong(const std::string& name, const std::string& expected, int64_t got);

// An argument of an operator. kind: none, tensor, tensors, int, ints, float, bool, dtype; what it needs of the rest.
Argument argument(const std::string& kind, bool optional, std::vector<int64_t> ints, double number,
                  const std::string& dtype);

// Takes the steps in order and refuses what a run could not do: a slot that holds no tensor yet or no more.
class Builder {
 public:
  Builder(int32_t inputs, int32_t constants);

  Slot allocate(const std::string& dtype, std::vector<int64_t> sizes, std::vector<int64_t> strides, bool zero);
  void fill(Slot out, double number);
  Slot view(Slot base, std::vector<int64_t> sizes, std::vector<int64_t> strides, int64_t offset);
  void multiply(Slot out, Slot added, Slot a, Slot b);
  // results: which are kept. Returns the slots of those.
  std::vector<Slot> call(const std::string& name, const std::string& overload, std::vector<Argument> arguments,
                         const std::vector<bool>& results);
  void launch(const std::string& name, uint64_t function, const std::vector<uint32_t>& grid,
              const std::vector<uint32_t>& block, uint32_t shared_bytes,
              const std::vector<std::pair<int32_t, std::vector<uint32_t>>>& attributes, std::vector<uint64_t> values,
              const std::vector<std::tuple<int32_t, Slot, int64_t>>& holes);
  // The step before was the last that needed these.
  void release(const std::vector<Slot>& slots);
  // The finished plan; nothing can be added any more. -1: None.
  std::shared_ptr<const Plan> finish(std::vector<Slot> results);

 private:
  void add(std::variant<Allocate, Fill, View, Multiply, Call, Launch> action);
  Slot make();
  void check(const char* name, Slot slot) const;

  std::shared_ptr<Plan> plan_ = std::make_shared<Plan>();
  std::vector<bool> held_;  // by slot: whether it holds a tensor after the steps so far
};

}  // namespace fastlora::plan
