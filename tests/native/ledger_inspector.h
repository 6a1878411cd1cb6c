// Looks into the ledger's records, for tests.
#pragma once

#include <string>

#include "metal/ledger.h"

namespace mlx_safe::metal {

struct LedgerInspector {
  // Aborts, with a line on stderr, where the records contradict each other.
  static void check(const Ledger& ledger);

  // All that the ledger knows, as text that is the same for the same knowledge.
  // Failures are told apart by their messages.
  static std::string digest(const Ledger& ledger);

  // Lets go of what is in flight, so that the ledger can be destroyed: buffers
  // and queues hold each other. The library never destroys its own.
  static void dismantle(Ledger& ledger);
};

}  // namespace mlx_safe::metal
