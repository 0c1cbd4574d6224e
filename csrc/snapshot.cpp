#include "snapshot.h"

#include <pybind11/stl.h>

#include <utility>
#include <vector>

namespace resnet_fast {
namespace {

namespace py = pybind11;

// The entries of dictionaries and the classes of objects. Only pointers are compared: the objects in between are not in
// cache after a network has run, and each read would wait for memory.
class Contents {
 public:
  Contents(std::vector<py::dict> dicts, std::vector<py::dict> empty, std::vector<py::object> objects)
      : dicts_(std::move(dicts)), empty_(std::move(empty)), objects_(std::move(objects)) {
    each_entry([&](PyObject* key, PyObject* value) {
      entries_.emplace_back(py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value));
      return true;
    });
    for (const py::dict& d : dicts_) sizes_.push_back(d.size());
    for (const py::object& o : objects_) classes_.push_back(py::type::of(o));
  }

  bool same() const {
    for (size_t i = 0; i < dicts_.size(); ++i) {
      if (dicts_[i].size() != sizes_[i]) return false;
    }
    for (const py::dict& d : empty_) {
      if (!d.empty()) return false;
    }
    for (size_t i = 0; i < objects_.size(); ++i) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(objects_[i].ptr())) != classes_[i].ptr()) return false;
    }
    auto entry = entries_.begin();
    return each_entry([&](PyObject* key, PyObject* value) {
      const bool equal = entry->first.ptr() == key && entry->second.ptr() == value;
      ++entry;
      return equal;
    });
  }

 private:
  // Until f(key, value) is false; whether it never was.
  template <class F>
  bool each_entry(F f) const {
    for (const py::dict& d : dicts_) {
      PyObject *key, *value;
      for (Py_ssize_t at = 0; PyDict_Next(d.ptr(), &at, &key, &value);) {
        if (!f(key, value)) return false;
      }
    }
    return true;
  }

  std::vector<py::dict> dicts_, empty_;
  std::vector<py::object> objects_;
  std::vector<std::pair<py::object, py::object>> entries_;
  std::vector<size_t> sizes_;
  std::vector<py::object> classes_;
};

}  // namespace

void bind_snapshot(py::module_& m) {
  py::class_<Contents>(m, "Contents", "The entries of dictionaries and the classes of objects, at one time")
      .def(py::init<std::vector<py::dict>, std::vector<py::dict>, std::vector<py::object>>(), py::arg("dicts"),
           py::arg("empty"), py::arg("objects"))
      .def("same", &Contents::same,
           "Whether the entries of `dicts` and the classes of `objects` are the same objects as then, and `empty` empty");
}

}  // namespace resnet_fast
