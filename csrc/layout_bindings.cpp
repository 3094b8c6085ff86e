// RankLayout for Python. The module has no tensors in it, so it needs no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "layout.h"

namespace py = pybind11;
using fastlora::RankLayout;

PYBIND11_MODULE(_layout, m) {
  m.doc() = "OperandCache of adapter factors: see RankLayout.";
  py::class_<RankLayout>(
      m, "RankLayout",
      "Where the factors of all adapters and projections of one layer lie in packed storage.\n\n"
      "Blocks are ordered adapter by adapter, then projection by projection: block (g, p) is number\n"
      "g * num_projections + p. A blocks are [r, in_features], B blocks [out_features[p], r];\n"
      "a_offsets and b_offsets count elements, rank_offsets ranks, column_offsets outputs.\n"
      "A layout never changes: methods return another one and pack only the adapter that changed.\n\n"
      "Raises ValueError for a negative rank, a size below 1, a wrong number of ranks, or sizes\n"
      "whose products do not fit in 64 bits.")
      .def(py::init<std::vector<std::vector<int64_t>>, std::vector<int64_t>, int64_t>(), py::arg("ranks"),
           py::arg("out_features"), py::arg("in_features"))
      .def_property_readonly("ranks", &RankLayout::ranks)
      .def_property_readonly("out_features", &RankLayout::out_features)
      .def_property_readonly("in_features", &RankLayout::in_features)
      .def_property_readonly("num_adapters", &RankLayout::num_adapters)
      .def_property_readonly("num_projections", &RankLayout::num_projections)
      .def_property_readonly("total_rank", &RankLayout::total_rank)
      .def_property_readonly("a_numel", &RankLayout::a_numel)
      .def_property_readonly("b_numel", &RankLayout::b_numel)
      .def_property_readonly("rank_offsets", &RankLayout::rank_offsets)
      .def_property_readonly("a_offsets", &RankLayout::a_offsets)
      .def_property_readonly("b_offsets", &RankLayout::b_offsets)
      .def_property_readonly("column_offsets", &RankLayout::column_offsets)
      .def_property_readonly("nbytes", &RankLayout::nbytes, "Bytes that the layout itself takes.")
      .def("adapter_offsets", &RankLayout::adapter_offsets, py::arg("adapter"),
           "One adapter's columns of h: prefix sums of its ranks over the projections.")
      .def("width", &RankLayout::width, py::arg("probes") = std::vector<int64_t>{},
           "Columns of h of a mixed batch: max over adapters of their total rank and their probe columns.")
      .def("add_adapter", &RankLayout::add_adapter, py::arg("ranks"),
           "The same layer with one more adapter, the last; operand_caches of the others are shared.")
      .def("delete_adapter", &RankLayout::delete_adapter, py::arg("adapter"),
           "The same layer without an adapter; later adapters move up by one.")
      .def("with_ranks", &RankLayout::with_ranks, py::arg("adapter"), py::arg("ranks"),
           "The same layer with other ranks for one adapter; operand_caches of the others are shared.")
      .def("column_starts", &RankLayout::column_starts,
           "adapter_offsets of all adapters, one after another: what the operators over many adapters take.")
      .def("select", &RankLayout::select, py::arg("adapters"),
           "The same layer with these adapters alone, in this order; their operand_caches are shared.")
      .def("shared_with", &RankLayout::shared_with, py::arg("other"),
           "How many of other's adapters were not packed again but are those of this layout.")
      .def(
          "tiles",
          [](const RankLayout& self, const std::vector<std::pair<int64_t, int64_t>>& ranges, int64_t block) {
            std::vector<std::tuple<int64_t, int64_t, int64_t>> found;
            for (const fastlora::Tile& tile : self.tiles(ranges, block)) {
              found.emplace_back(tile.adapter, tile.first, tile.rows);
            }
            return found;
          },
          py::arg("ranges"), py::arg("block"),
          "Tile schedule: (adapter, first position, rows) over ranges[adapter] = (begin, end), at most block rows\n"
          "each; none for an adapter whose ranks are all 0.")
      .def("operations", &RankLayout::operations, py::arg("rows"),
           "Multiply-adds of a forward with rows[g] rows of adapter g: sum rows_g r_gi (K + N_i).")
      .def("factor_bytes", &RankLayout::factor_bytes, py::arg("item_size"),
           "Bytes of the packed A and B of all adapters.")
      .def("__eq__",
           [](const RankLayout& self, const py::object& other) -> py::object {
             if (!py::isinstance<RankLayout>(other)) return py::reinterpret_borrow<py::object>(Py_NotImplemented);
             return py::bool_(self == other.cast<const RankLayout&>());
           })
      .def("__hash__", [](const RankLayout& self) { return py::hash(py::str(self.to_string())); })
      .def("__repr__", &RankLayout::to_string)
      .def(py::pickle(
          [](const RankLayout& self) { return py::make_tuple(self.ranks(), self.out_features(), self.in_features()); },
          [](const py::tuple& state) {
            if (state.size() != 3) throw py::value_error("the pickled state of a RankLayout has 3 entries");
            return RankLayout(state[0].cast<std::vector<std::vector<int64_t>>>(), state[1].cast<std::vector<int64_t>>(),
                              state[2].cast<int64_t>());
          }));
}
