// The state of Python objects, to tell whether it has changed (resnet_fast/dispatch/snapshot.py).
#pragma once

#include <pybind11/pybind11.h>

namespace resnet_fast {

// Adds the class Contents to the module.
void bind_snapshot(pybind11::module_& m);

}  // namespace resnet_fast
