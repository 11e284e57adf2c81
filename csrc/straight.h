// Calls from Python that need no Python: see straight.cpp.
#pragma once

struct _object;  // Python's PyObject

namespace handtuned {

// Adds straight_cell and straight_layer to the extension's module.
void add_straight(_object* module);

}  // namespace handtuned
