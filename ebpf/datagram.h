// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// With whom sockets exchange datagrams: each pair of a socket and a service has two entries, for what is sent and
// for what is got.
#pragma once
#include "socket.h"

// Whether something was sent or got not too long ago.
static __always_inline bool is_young(const struct datagram *datagram) {
    __u32 network = datagram->network;
    struct timeouts *times = bpf_map_lookup_elem(&timeouts, &network);
    return times && (__s32)(seconds() - datagram->seen) < (__s32)times->udp;
}

static __always_inline bool has_backend(const struct datagram *datagram) {
    __u32 number = datagram->backend;
    return bpf_map_lookup_elem(&backends, &number);
}
