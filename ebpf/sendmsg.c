// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// sendto(2) and sendmsg(2) of a container's UDP socket that is not connected: what is for a service goes to a
// backend, as long as that is there and the socket speaks with it.
#include "socket.h"

// Whether a backend is there, and the socket has spoken with it not too long ago.
static __always_inline bool goes_on(const struct datagram *to) {
    __u32 network = to->network, backend = to->backend;
    struct timeouts *times = bpf_map_lookup_elem(&timeouts, &network);
    return times && (__s32)(seconds() - to->seen) < (__s32)times->udp &&
           bpf_map_lookup_elem(&backends, &backend);
}

// Enters that what a backend sends to a socket comes from a service. Gives -1 where something else is known of
// the two.
static __always_inline int enter_reply(const struct datagram_key *asked, const struct datagram *to) {
    struct datagram_key key = {.socket = asked->socket, .address = to->address, .port = to->port, .reply = 1};
    struct datagram from = {
        .address = asked->address,
        .port = asked->port,
        .network = to->network,
        .backend = to->backend,
        .seen = to->seen,
    };
    struct datagram *there = bpf_map_lookup_elem(&datagrams, &key);
    if (there && (there->port != from.port || !same(&there->address, &from.address)))
        return -1;
    return bpf_map_update_elem(&datagrams, &key, &from, BPF_ANY) ? -1 : 0;
}

// Gives whether a datagram's target is another one now.
static __always_inline bool send_to_service(struct bpf_sock_addr *ctx, struct target *target) {
    struct question question = {};
    struct datagram_key key = {};
    struct target service, got = {};
    if (ctx->protocol != IPPROTO_UDP)
        return false;
    service = *target;
    if (!is_for_service(ctx, &service, &question))
        return false;
    key.socket = bpf_get_socket_cookie(ctx);
    key.address = service.address;
    key.port = service.port;
    struct datagram *known = bpf_map_lookup_elem(&datagrams, &key);
    if (known && goes_on(known)) {
        target->address = known->address;
        target->port = known->port;
        // Once a second the other entry is as young as this one, and there where it was not.
        if (known->seen != seconds()) {
            known->seen = seconds();
            enter_reply(&key, known);
        }
        return true;
    }
    __u32 chosen = choose(&question, &got);
    if (!chosen)
        return false;
    struct datagram to = {
        .address = got.address,
        .port = got.port,
        .network = question.tuple.network,
        .backend = chosen,
        .seen = seconds(),
    };
    // A socket that speaks with this backend for another service has its packets balanced.
    if (enter_reply(&key, &to) || bpf_map_update_elem(&datagrams, &key, &to, BPF_ANY))
        return false;
    count_connection(chosen);
    show(&question, &got);
    *target = got;
    return true;
}

SEC("cgroup/sendmsg4")
int netctl_send4(struct bpf_sock_addr *ctx) {
    struct target target = target4(ctx);
    return send_to_service(ctx, &target) ? put4(ctx, &target) : ALLOW;
}

SEC("cgroup/sendmsg6")
int netctl_send6(struct bpf_sock_addr *ctx) {
    struct target target = target6(ctx);
    return send_to_service(ctx, &target) ? put6(ctx, &target) : ALLOW;
}

const char LICENSE[] SEC("license") = "Dual MIT/GPL";
