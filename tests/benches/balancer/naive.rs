//! The two proxies that anybody would write first: one on tokio, one on tokio-uring. One thread, one task a
//! direction, nothing else.

use std::net::SocketAddr;

pub fn tokio_proxy(listen: &str, upstream: &str) {
    let upstream: SocketAddr = upstream.parse().expect("an address");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(listen).await.expect("a listener");
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = client.set_nodelay(true);
                let Ok(mut server) = tokio::net::TcpStream::connect(upstream).await else { return };
                let _ = server.set_nodelay(true);
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
}

pub fn tokio_uring_proxy(listen: &str, upstream: &str) {
    use std::rc::Rc;

    use tokio_uring::net::{TcpListener, TcpStream};

    /// Copies until the end of the stream, then passes the end on.
    async fn copy(from: Rc<TcpStream>, to: Rc<TcpStream>) {
        let mut buffer = vec![0_u8; 16 * 1024];
        loop {
            let (read, filled) = from.read(buffer).await;
            buffer = filled;
            let Ok(count @ 1..) = read else { break };
            let (written, part) = to.write_all(tokio_uring::buf::BoundedBuf::slice(buffer, ..count)).await;
            buffer = part.into_inner();
            if written.is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Write);
    }

    let listen: SocketAddr = listen.parse().expect("an address");
    let upstream: SocketAddr = upstream.parse().expect("an address");
    tokio_uring::start(async {
        let listener = TcpListener::bind(listen).expect("a listener");
        while let Ok((client, _)) = listener.accept().await {
            tokio_uring::spawn(async move {
                let _ = client.set_nodelay(true);
                let Ok(server) = TcpStream::connect(upstream).await else { return };
                let _ = server.set_nodelay(true);
                let (client, server) = (Rc::new(client), Rc::new(server));
                let up = tokio_uring::spawn(copy(client.clone(), server.clone()));
                copy(server, client).await;
                let _ = up.await;
            });
        }
    });
}
