// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// Errors about packets of connections (RFC 792, RFC 4443): they show the packet as who gets the error has
// sent it.
#pragma once
#include "connection.h"
#include "rewrite.h"

// The header of an error, before the packet that it is about, and where its checksum is.
#define ERROR_HEADER 8
#define ERROR_CHECKSUM 2

// The types of errors (the kernel's header for the first pulls in the C library's).
#define ICMP_DEST_UNREACH 3
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12
#define ICMPV6_DEST_UNREACH 1
#define ICMPV6_PKT_TOOBIG 2
#define ICMPV6_TIME_EXCEED 3
#define ICMPV6_PARAMPROB 4

// Whether a packet is ICMP at all.
static __always_inline bool is_error(const struct packet *packet) {
    __u8 protocol = packet->tuple.protocol;
    return packet->whole && !packet->fragment &&
           protocol == (packet->ipv4 ? IPPROTO_ICMP : IPPROTO_ICMPV6);
}

// Whether a type is one of an error about a packet.
static __always_inline bool has_packet(bool ipv4, __u8 type) {
    if (ipv4)
        return type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETERPROB;
    return type == ICMPV6_DEST_UNREACH || type == ICMPV6_PKT_TOOBIG || type == ICMPV6_TIME_EXCEED ||
           type == ICMPV6_PARAMPROB;
}

// The packet within an error: its addresses and ports, and where they are.
struct inner {
    struct tuple tuple;
    __u32 header;
    __u32 transport;
};

static __always_inline int
read_inner(struct __sk_buff *skb, const struct packet *packet, struct inner *inner) {
    struct ports ports;
    inner->header = packet->transport + ERROR_HEADER;
    inner->tuple.network = packet->tuple.network;
    if (packet->ipv4) {
        struct iphdr ip;
        if (bpf_skb_load_bytes(skb, inner->header, &ip, sizeof ip) || ip.version != 4 || ip.ihl < 5 ||
            ip.frag_off & bpf_htons(FRAGMENT_OFFSET))
            return -1;
        map_ipv4(&inner->tuple.source, ip.saddr);
        map_ipv4(&inner->tuple.destination, ip.daddr);
        inner->tuple.protocol = ip.protocol;
        inner->transport = inner->header + ip.ihl * 4;
    } else {
        struct ipv6hdr ip;
        if (bpf_skb_load_bytes(skb, inner->header, &ip, sizeof ip) || ip.version != 6)
            return -1;
        copy_ipv6(&inner->tuple.source, &ip.saddr);
        copy_ipv6(&inner->tuple.destination, &ip.daddr);
        inner->tuple.protocol = ip.nexthdr;
        inner->transport = inner->header + sizeof ip;
    }
    __u8 protocol = inner->tuple.protocol;
    if (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP && protocol != IPPROTO_SCTP)
        return -1;
    if (bpf_skb_load_bytes(skb, inner->transport, &ports, sizeof ports))
        return -1;
    inner->tuple.source_port = ports.source;
    inner->tuple.destination_port = ports.destination;
    return 0;
}

// Gives the packet within an error another address: its destination where `to`, else its source.
static __always_inline int rewrite_inner(struct __sk_buff *skb, const struct packet *packet,
                                         const struct inner *inner, bool to, struct address *old,
                                         struct address *new) {
    if (packet->ipv4) {
        __u32 at = inner->header + (to ? offsetof(struct iphdr, daddr) : offsetof(struct iphdr, saddr));
        // What the address adds to the error's checksum the checksum of its header takes away.
        return bpf_l3_csum_replace(skb, inner->header + offsetof(struct iphdr, check), old->words[3],
                                   new->words[3], sizeof(__be32)) ||
               bpf_skb_store_bytes(skb, at, &new->words[3], sizeof(__be32), 0);
    }
    __u32 checksum = packet->transport + ERROR_CHECKSUM;
    __u32 at = inner->header + (to ? offsetof(struct ipv6hdr, daddr) : offsetof(struct ipv6hdr, saddr));
    __s64 sum = bpf_csum_diff(old->words, sizeof *old, new->words, sizeof *new, 0);
    return sum < 0 || bpf_l4_csum_replace(skb, checksum, 0, sum, 0) ||
           bpf_skb_store_bytes(skb, at, new, sizeof *new, 0);
}

// Gives the error itself another address.
static __always_inline int rewrite_outer(struct __sk_buff *skb, const struct packet *packet, bool to,
                                         struct address *old, struct address *new) {
    if (same(old, new))
        return 0;
    if (packet->ipv4) {
        __u32 at = ETH_HLEN + (to ? offsetof(struct iphdr, daddr) : offsetof(struct iphdr, saddr));
        return bpf_l3_csum_replace(skb, ETH_HLEN + offsetof(struct iphdr, check), old->words[3],
                                   new->words[3], sizeof(__be32)) ||
               bpf_skb_store_bytes(skb, at, &new->words[3], sizeof(__be32), 0);
    }
    __u32 checksum = packet->transport + ERROR_CHECKSUM;
    __u32 at = ETH_HLEN + (to ? offsetof(struct ipv6hdr, daddr) : offsetof(struct ipv6hdr, saddr));
    __s64 sum = bpf_csum_diff(old->words, sizeof *old, new->words, sizeof *new, 0);
    return sum < 0 || bpf_l4_csum_replace(skb, checksum, 0, sum, BPF_F_PSEUDO_HDR) ||
           bpf_skb_store_bytes(skb, at, new, sizeof *new, 0);
}

// An error about a packet of a connection. To the client (`reply`) it shows the packet that the client
// sent, to the service; to the backend the one that the backend sent, to the client.
SEPARATE int translate_error(struct __sk_buff *skb, struct packet *packet, __u8 reply) {
    if (!packet)
        return PASS;
    struct inner inner = {};
    __u8 type;
    if (bpf_skb_load_bytes(skb, packet->transport, &type, 1) || !has_packet(packet->ipv4, type) ||
        read_inner(skb, packet, &inner))
        return PASS;
    // A packet of the opposite direction finds the connection.
    struct tuple key = {
        .network = inner.tuple.network,
        .source = inner.tuple.destination,
        .destination = inner.tuple.source,
        .source_port = inner.tuple.destination_port,
        .destination_port = inner.tuple.source_port,
        .protocol = inner.tuple.protocol,
        .reply = reply,
    };
    struct connection *found = bpf_map_lookup_elem(&connections, &key);
    if (!found || found->loops || found->interface != skb->ifindex)
        return PASS;
    struct connection connection = *found;
    // The side that is translated: of the packet within its destination for a client, else its source.
    struct address *old = reply ? &key.source : &key.destination;
    struct address *new = reply ? &connection.source : &connection.destination;
    __be16 old_port = reply ? key.source_port : key.destination_port;
    __be16 new_port = reply ? connection.source_port : connection.destination_port;
    __u32 checksum = packet->transport + ERROR_CHECKSUM;
    if (rewrite_inner(skb, packet, &inner, reply, old, new))
        return lost(packet);
    if (old_port != new_port &&
        (bpf_l4_csum_replace(skb, checksum, old_port, new_port, sizeof new_port) ||
         bpf_skb_store_bytes(skb, inner.transport + (reply ? 2 : 0), &new_port, sizeof new_port, 0)))
        return lost(packet);
    // The backend's own error comes from the service; one for the service goes to the backend. What a
    // router between them says stays the router's.
    struct address *outer = reply ? &packet->tuple.source : &packet->tuple.destination;
    if (same(outer, old) && rewrite_outer(skb, packet, !reply, outer, new))
        return lost(packet);
    return PASS;
}
