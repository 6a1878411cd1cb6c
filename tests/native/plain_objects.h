#pragma once

namespace plain_objects {

// How often objects are retained and not released now.
extern long references;

}  // namespace plain_objects
