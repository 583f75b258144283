// The kernels of NATTEN2_NUMBER and NATTEN2_CHANNELS.
#include "launch.h"

namespace natten2::cuda {

template Failure run_forward<NATTEN2_NUMBER, NATTEN2_CHANNELS>(const Forward& args, void* stream);
template Failure run_backward<NATTEN2_NUMBER, NATTEN2_CHANNELS>(const Backward& args, void* stream);

}  // namespace natten2::cuda
