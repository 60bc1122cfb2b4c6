// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// recvfrom(2) and recvmsg(2) of a UDP socket: what a backend sends comes from the service that was asked for.
#include "datagram.h"

// Gives whether a datagram is of a service, which is its target now.
static __always_inline bool is_of_service(struct bpf_sock_addr *ctx, struct target *target) {
    struct datagram_key key = {
        .socket = bpf_get_socket_cookie(ctx),
        .address = target->address,
        .port = target->port,
        .reply = 1,
    };
    struct datagram *from = bpf_map_lookup_elem(&datagrams, &key);
    if (!from || !is_young(from))
        return false;
    target->address = from->address;
    target->port = from->port;
    // Who only listens stays with its backend, as long as that is there.
    if (from->seen != seconds() && has_backend(from))
        from->seen = seconds();
    return true;
}

SEC("cgroup/recvmsg4")
int netctl_receive4(struct bpf_sock_addr *ctx) {
    struct target target = target4(ctx);
    if (is_of_service(ctx, &target))
        put4(ctx, &target);
    return ALLOW;
}

SEC("cgroup/recvmsg6")
int netctl_receive6(struct bpf_sock_addr *ctx) {
    struct target target = target6(ctx);
    if (is_of_service(ctx, &target))
        put6(ctx, &target);
    return ALLOW;
}

const char LICENSE[] SEC("license") = "Dual MIT/GPL";
