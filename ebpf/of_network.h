// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// Programs of which each network has its own.
#pragma once
#include <linux/types.h>

// The network that a program serves: it is set when the program is loaded.
const volatile __u32 network = 0;
