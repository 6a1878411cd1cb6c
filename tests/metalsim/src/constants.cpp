// The string constants that metal-cpp names: each is an NSString of its own
// name, or of the value that Metal is known to have.

#include "foundation.h"

using namespace metalsim;

// Declared first: the linkage and the visibility are of a declaration.
#define METALSIM_CONSTANT(name, value) \
  METALSIM_EXPORT id name;             \
  id name = make_string(value);
#define METALSIM_STRING(name) METALSIM_CONSTANT(name, #name)
#define METALSIM_COUNTER(name) METALSIM_STRING(MTLCommonCounter##name)

METALSIM_STRING(MTLBinaryArchiveDomain)
METALSIM_STRING(MTLCommandBufferEncoderInfoErrorKey)
METALSIM_STRING(MTLCounterErrorDomain)
METALSIM_STRING(MTLIOErrorDomain)
METALSIM_STRING(MTLLogStateErrorDomain)
METALSIM_STRING(MTLTensorDomain)
METALSIM_COUNTER(ClipperInvocations)
METALSIM_COUNTER(ClipperPrimitivesOut)
METALSIM_COUNTER(ComputeKernelInvocations)
METALSIM_COUNTER(FragmentCycles)
METALSIM_COUNTER(FragmentInvocations)
METALSIM_COUNTER(FragmentsPassed)
METALSIM_COUNTER(PostTessellationVertexCycles)
METALSIM_COUNTER(PostTessellationVertexInvocations)
METALSIM_COUNTER(RenderTargetWriteCycles)
METALSIM_COUNTER(SetStageUtilization)
METALSIM_COUNTER(SetStatistic)
METALSIM_COUNTER(SetTimestamp)
METALSIM_COUNTER(TessellationCycles)
METALSIM_COUNTER(TessellationInputPatches)
METALSIM_COUNTER(Timestamp)
METALSIM_COUNTER(TotalCycles)
METALSIM_COUNTER(VertexCycles)
METALSIM_COUNTER(VertexInvocations)
METALSIM_STRING(NSBundleDidLoadNotification)
METALSIM_STRING(NSBundleResourceRequestLowDiskSpaceNotification)
METALSIM_STRING(NSCocoaErrorDomain)
METALSIM_STRING(NSDebugDescriptionErrorKey)
METALSIM_STRING(NSDeviceCertificationiPhonePerformanceGaming)
METALSIM_STRING(NSFilePathErrorKey)
METALSIM_STRING(NSHelpAnchorErrorKey)
METALSIM_STRING(NSLocalizedFailureErrorKey)
METALSIM_STRING(NSLocalizedFailureReasonErrorKey)
METALSIM_STRING(NSLocalizedRecoveryOptionsErrorKey)
METALSIM_STRING(NSLocalizedRecoverySuggestionErrorKey)
METALSIM_STRING(NSMachErrorDomain)
METALSIM_STRING(NSOSStatusErrorDomain)
METALSIM_STRING(NSPOSIXErrorDomain)
METALSIM_STRING(NSProcessInfoPerformanceProfileDidChangeNotification)
METALSIM_STRING(NSProcessInfoPowerStateDidChangeNotification)
METALSIM_STRING(NSProcessInfoThermalStateDidChangeNotification)
METALSIM_STRING(NSProcessPerformanceProfileDefault)
METALSIM_STRING(NSProcessPerformanceProfileSustained)
METALSIM_STRING(NSRecoveryAttempterErrorKey)
METALSIM_STRING(NSStringEncodingErrorKey)
METALSIM_STRING(NSURLErrorKey)

METALSIM_CONSTANT(NSLocalizedDescriptionKey, "NSLocalizedDescription")
METALSIM_CONSTANT(NSUnderlyingErrorKey, "NSUnderlyingError")
