//! What go-plugin wants of any plugin: to be told to exit, to be asked for its health, and two streams that nobody
//! uses but that must stay open.

use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::Notify;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use crate::proto::grpc::health::v1::health_check_response::ServingStatus;
use crate::proto::grpc::health::v1::health_server::Health;
use crate::proto::grpc::health::v1::{HealthCheckRequest, HealthCheckResponse};
use crate::proto::plugin::grpc_broker_server::GrpcBroker;
use crate::proto::plugin::grpc_controller_server::GrpcController;
use crate::proto::plugin::grpc_stdio_server::GrpcStdio;
use crate::proto::plugin::{ConnInfo, Empty, StdioData};

type Held<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Passes on that Nomad wants us gone.
#[derive(Debug)]
pub struct Controller {
    pub leave: Arc<Notify>,
}

#[tonic::async_trait]
impl GrpcController for Controller {
    async fn shutdown(&self, _: Request<Empty>) -> Result<Response<Empty>, Status> {
        self.leave.notify_one();
        Ok(Response::new(Empty {}))
    }
}

/// Both streams stay open and silent: what go-plugin would move over them, Nomad has no use for.
#[derive(Debug)]
pub struct Silent;

#[tonic::async_trait]
impl GrpcBroker for Silent {
    type StartStreamStream = Held<ConnInfo>;

    async fn start_stream(
        &self,
        request: Request<Streaming<ConnInfo>>,
    ) -> Result<Response<Self::StartStreamStream>, Status> {
        let unheard = request.into_inner().filter_map(|_| None);
        Ok(Response::new(Box::pin(
            unheard.chain(tokio_stream::pending()),
        )))
    }
}

#[tonic::async_trait]
impl GrpcStdio for Silent {
    type StreamStdioStream = Held<StdioData>;

    async fn stream_stdio(
        &self,
        _: Request<()>,
    ) -> Result<Response<Self::StreamStdioStream>, Status> {
        Ok(Response::new(Box::pin(tokio_stream::pending())))
    }
}

/// Serving for as long as it answers.
#[derive(Debug)]
pub struct Alive;

impl Alive {
    fn status(service: &str) -> Option<HealthCheckResponse> {
        matches!(service, "" | "plugin").then(|| HealthCheckResponse {
            status: ServingStatus::Serving.into(),
        })
    }
}

#[tonic::async_trait]
impl Health for Alive {
    type WatchStream = Held<HealthCheckResponse>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        match Self::status(&request.into_inner().service) {
            Some(status) => Ok(Response::new(status)),
            None => Err(Status::not_found("unknown service")),
        }
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let status = Self::status(&request.into_inner().service).unwrap_or(HealthCheckResponse {
            status: ServingStatus::ServiceUnknown.into(),
        });
        Ok(Response::new(Box::pin(
            tokio_stream::once(Ok(status)).chain(tokio_stream::pending()),
        )))
    }
}
