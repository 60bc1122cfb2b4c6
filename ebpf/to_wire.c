// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// What leaves a sandbox in the tunnel, where it enters the host's namespace: the host's routes and neighbours
// say by which device it goes on.
#include "packet.h"

static __always_inline int read_route(struct __sk_buff *skb, struct bpf_fib_lookup *route) {
    struct ports ports;
    __u32 at = ETH_HLEN;
    if (skb->protocol == bpf_htons(ETH_P_IP)) {
        struct iphdr ip;
        if (bpf_skb_load_bytes(skb, at, &ip, sizeof ip))
            return -1;
        route->family = 2; // AF_INET
        route->ipv4_src = ip.saddr;
        route->ipv4_dst = ip.daddr;
        at += sizeof ip;
    } else {
        struct ipv6hdr ip;
        if (bpf_skb_load_bytes(skb, at, &ip, sizeof ip))
            return -1;
        route->family = 10; // AF_INET6
        __builtin_memcpy(route->ipv6_src, &ip.saddr, sizeof route->ipv6_src);
        __builtin_memcpy(route->ipv6_dst, &ip.daddr, sizeof route->ipv6_dst);
        at += sizeof ip;
    }
    if (bpf_skb_load_bytes(skb, at, &ports, sizeof ports))
        return -1;
    // Among several ways of the host's the flow chooses.
    route->l4_protocol = IPPROTO_UDP;
    route->sport = ports.source;
    route->dport = ports.destination;
    // The length is not compared with the MTU: that was done where the packet entered the tunnel.
    route->tot_len = 1;
    return 0;
}

SEC("classifier")
int netctl_wire_out(struct __sk_buff *skb) {
    struct bpf_fib_lookup route = {.ifindex = skb->ifindex};
    long result = read_route(skb, &route) ? -1 : bpf_fib_lookup(skb, &route, sizeof route, 0);
    if (result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_NO_NEIGH) {
        note(EVENT_NO_ROUTE);
        return TC_ACT_SHOT;
    }
    struct bpf_redir_neigh next = {.nh_family = route.family};
    if (route.family == 2)
        next.ipv4_nh = route.ipv4_dst;
    else
        __builtin_memcpy(next.ipv6_nh, route.ipv6_dst, sizeof next.ipv6_nh);
    // The kernel asks for a neighbour that it does not know, and keeps those alive that it does.
    return bpf_redirect_neigh(route.ifindex, &next, sizeof next, 0);
}

const char LICENSE[] SEC("license") = "Dual MIT/GPL";
