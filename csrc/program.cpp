#include "program.h"

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/python_arg_parser.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace resnet_fast {
namespace {

namespace py = pybind11;
using at::Tensor;
using c10::IValue;

// Where a program holds a tensor: the index of an argument, or of a result of an earlier step.
struct Place {
  size_t index;
};

// An operand of a step: a constant, a tensor at a place, or a list of both.
struct Operand {
  IValue constant;
  std::optional<size_t> place;
  std::vector<Operand> items;

  static Operand of(const py::handle& value, const c10::TypePtr& type) {
    if (py::isinstance<Place>(value)) return {{}, value.cast<Place>().index, {}};
    const auto list = type->cast<c10::ListType>();
    if (list && (py::isinstance<py::list>(value) || py::isinstance<py::tuple>(value))) {
      Operand all{c10::impl::GenericList(list->getElementType()), std::nullopt, {}};
      bool constant = true;
      for (const py::handle item : value) {
        const Operand& last = all.items.emplace_back(of(item, list->getElementType()));
        constant = constant && !last.place && last.items.empty();
      }
      if (!constant) return all;
    }
    return {torch::jit::toIValue(value, type), std::nullopt, {}};
  }

  IValue read(const std::vector<IValue>& values) const {
    if (place) return values[*place];
    if (items.empty()) return constant;
    auto list = constant.toList().copy();
    for (const Operand& item : items) list.push_back(item.read(values));
    return list;
  }
};

// A call of an operator. results: places of its tensors, in order. last_used: places that no later step reads.
struct Call {
  c10::OperatorHandle op;
  std::vector<Operand> operands;
  std::vector<std::optional<size_t>> results;
  std::vector<size_t> last_used;

  void run(std::vector<IValue>& values) const {
    torch::jit::Stack stack;
    stack.reserve(operands.size());
    for (const Operand& operand : operands) stack.push_back(operand.read(values));
    op.callBoxed(stack);
    size_t i = 0;
    const auto keep = [&](IValue value) {
      if (i < results.size() && results[i]) values[*results[i]] = std::move(value);
      ++i;
    };
    for (IValue& value : stack) {
      if (!value.isList()) {
        keep(std::move(value));
        continue;
      }
      for (IValue item : value.toListRef()) keep(std::move(item));
    }
    for (const size_t place : last_used) values[place] = {};
  }
};

// The steps of a recorded function, each a call of an operator.
class Program {
 public:
  explicit Program(size_t places) : places_(places) {}

  void add(const std::string& name, const std::string& overload, const py::tuple& args, const py::dict& kwargs,
           std::vector<std::optional<size_t>> results, std::vector<size_t> last_used) {
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    const auto symbol = c10::Symbol::fromQualString(name);  // x + 1 is add.Tensor with a number
    const torch::jit::ToIValueAllowNumbersAsTensors numbers(
        symbol.is_aten() && torch::should_allow_numbers_as_tensors(symbol.toUnqualString()));
    std::vector<Operand> operands;
    for (const c10::Argument& argument : op.schema().arguments()) {
      const size_t i = operands.size();
      if (i < args.size()) {
        operands.push_back(Operand::of(args[i], argument.type()));
      } else if (const py::str key(argument.name()); kwargs.contains(key)) {
        operands.push_back(Operand::of(kwargs[key], argument.type()));
      } else {
        TORCH_CHECK_VALUE(argument.default_value().has_value(), name, ": ", argument.name(), ": expected a value");
        operands.push_back({*argument.default_value(), std::nullopt, {}});
      }
    }
    calls_.push_back({op, std::move(operands), std::move(results), std::move(last_used)});
  }

  // The tensors at the places `wanted` after all steps, for these arguments. Warnings are Python's.
  py::list run(const py::sequence& arguments, const std::vector<size_t>& wanted) const {
    HANDLE_TH_ERRORS
    std::vector<IValue> values(places_);
    for (size_t i = 0; i < arguments.size(); ++i) {
      const py::object argument = arguments[i];
      if (!argument.is_none()) values[i] = argument.cast<Tensor>();
    }
    {
      const py::gil_scoped_release release;
      for (const Call& call : calls_) call.run(values);
    }
    py::list results;
    for (const size_t place : wanted) results.append(torch::jit::toPyObject(values[place]));
    return results;
    END_HANDLE_TH_ERRORS_PYBIND
  }

 private:
  size_t places_;
  std::vector<Call> calls_;
};

// What the steps of a recorded call depend on, as bytes: dtypes, shapes, strides and alignment to 16 bytes of `tensors`
// (or None), their device, autocast and TF32. None if a tensor has another class than Tensor and Parameter, or is on
// another device than the first.
std::optional<py::bytes> kinds(const py::sequence& tensors) {
  std::vector<int64_t> words;
  std::optional<at::Device> device;
  for (const py::handle item : tensors) {
    if (item.is_none()) {
      words.push_back(-1);
      continue;
    }
    if (!THPVariable_CheckExact(item.ptr())) return std::nullopt;
    const Tensor& t = THPVariable_Unpack(item.ptr());
    if (t.layout() != at::kStrided || t.device() != device.value_or(t.device())) return std::nullopt;
    device = t.device();
    const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    words.insert(words.end(), {t.dim(), int64_t(t.scalar_type()), int64_t(address % 16)});
    words.insert(words.end(), t.sizes().begin(), t.sizes().end());
    words.insert(words.end(), t.strides().begin(), t.strides().end());
  }
  if (!device) return std::nullopt;
  words.insert(words.end(), {int64_t(device->type()), device->index(), at::globalContext().allowTF32CuDNN(),
                             at::autocast::is_autocast_enabled(device->type())});
  return py::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t));
}

}  // namespace

void bind_program(py::module_& m) {
  py::class_<Place>(m, "Place", "Where a program holds a tensor").def(py::init<size_t>(), py::arg("index"));
  py::class_<Program>(m, "Program", "Calls of operators, run without Python between them")
      .def(py::init<size_t>(), py::arg("places"))
      .def("add", &Program::add, py::arg("name"), py::arg("overload"), py::arg("args"), py::arg("kwargs"),
           py::arg("results"), py::arg("last_used"), "Append a call; tensors among its operands are Places")
      .def("__call__", &Program::run, py::arg("arguments"), py::arg("wanted"),
           "Run all calls for these arguments; returns the tensors at the places `wanted`");
  m.def("kinds", &kinds, py::arg("tensors"),
        "What a program for plain tensors of one device depends on, as bytes; None for others");
}

}  // namespace resnet_fast
